"""A real Ray that grows, of which a node with work on it is taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.on_ray.test_growing import found_by, program
from tests.fake_cluster import NodeType, head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_work_leaves_a_node_that_is_taken_away_and_goes_on_on_another(tmp_path: Path) -> None:
    body = """
    from cluster.cloud.preemption import latest_notice

    def until_told(name):
        (folder / name).write_text(node())
        began = time.time()
        while latest_notice() is None and time.time() - began < 60:
            time.sleep(0.05)
        return node(), latest_notice() is not None

    executor.submit("first", until_told, "first", resources=Resources())
    while not (folder / "first").exists():
        time.sleep(0.1)
    import ray
    from ray.core.generated import autoscaler_pb2
    took_away, ends_at_ms = (folder / "first").read_text(), int((time.time() + 60) * 1000)
    ray._private.worker.global_worker.gcs_client.drain_node(
        took_away, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "a test takes it away", ends_at_ms)
    first = told(all_of(executor))
    executor.submit("second", spend, "second", 0.1, resources=Resources())
    print(json.dumps([took_away, first, told(all_of(executor))]))
    """
    with head({"spot": NodeType(most=2)}) as cluster, program(cluster, tmp_path, body) as process:
        took_away, [first], [second] = found_by(process)
    assert first == ["first", [took_away, True], None, False]
    assert second[1][0] != took_away
