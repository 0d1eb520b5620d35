"""A node of a real Ray is drained while a task runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.on_ray.test_growing import output_of, program
from tests.fake_cluster import NodeType, head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_a_task_learns_that_its_node_is_drained_and_the_next_task_runs_on_another_node(
    tmp_path: Path,
) -> None:
    body = """
    from cluster.cloud.preemption import latest_notice

    def until_notice(name):
        (folder / name).write_text(node())
        began = time.time()
        while latest_notice() is None and time.time() - began < 60:
            time.sleep(0.05)
        return node(), latest_notice() is not None

    executor.submit("first", until_notice, "first", resources=Resources())
    while not (folder / "first").exists():
        time.sleep(0.1)
    import ray
    from ray.core.generated import autoscaler_pb2
    drained_node, ends_at_ms = (folder / "first").read_text(), int((time.time() + 60) * 1000)
    ray._private.worker.global_worker.gcs_client.drain_node(
        drained_node, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "a test takes it away", ends_at_ms)
    first = rows(all_of(executor))
    executor.submit("second", spend, "second", 0.1, resources=Resources())
    print(json.dumps([drained_node, first, rows(all_of(executor))]))
    """
    with head({"spot": NodeType(max_nodes=2)}) as cluster, program(cluster, tmp_path, body) as process:
        drained_node, [first], [second] = output_of(process)
    assert first == ["first", [drained_node, True], None, False]
    assert second[1][0] != drained_node
