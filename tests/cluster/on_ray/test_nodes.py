"""What a cluster that grows tells of its nodes: by it a study is billed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.fake_cluster import NodeType, head

pytestmark = pytest.mark.cluster

DRIVER = """
import json, sys
from contextlib import closing
from cluster.executors.executor import Resources
from cluster.on_ray.executor import RayExecutor

def told(executor):
    return sorted([one.name, one.region, one.spot, count] for one, count in executor.nodes().items())

with closing(RayExecutor(address=sys.argv[1])) as executor:
    before = told(executor)
    executor.submit("piece", len, "four", resources=Resources())
    (ended,) = executor.wait(120)
    print(json.dumps([before, ended.value, told(executor)]))
"""


def test_a_node_is_billed_by_its_labels_as_soon_as_it_is_up() -> None:
    labels = {"instance": "g6.2xlarge", "region": "us-east-1", "market": "spot", "gpu": "L4"}
    with head({"gpu-spot": NodeType(labels=labels, most=1)}) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, cluster.gcs],
            env=dict(cluster.env),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        before, value, after = json.loads(done.stdout.splitlines()[-1])
    assert value == 4
    assert sum(count for *_, count in before) == 1  # the head
    assert after == sorted([*before, ["g6.2xlarge", "us-east-1", True, 1]])
