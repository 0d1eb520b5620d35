"""The nodes that a growing cluster reports: a study is billed by them."""

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

def nodes(executor):
    return sorted([node.name, node.region, node.spot, count] for node, count in executor.nodes().items())

with closing(RayExecutor(address=sys.argv[1])) as executor:
    first = nodes(executor)
    executor.submit("task", len, "four", resources=Resources())
    (ended,) = executor.wait(120)
    print(json.dumps([first, ended.value, nodes(executor)]))
"""


def test_a_node_is_billed_by_its_labels_as_soon_as_it_is_up() -> None:
    labels = {"instance": "g6.2xlarge", "region": "us-east-1", "market": "spot", "gpu": "L4"}
    with head({"gpu-spot": NodeType(labels=labels, max_nodes=1)}) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, cluster.gcs],
            env=dict(cluster.env),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        first, value, last = json.loads(done.stdout.splitlines()[-1])
    assert value == 4
    assert sum(count for *_, count in first) == 1  # the head
    assert last == sorted([*first, ["g6.2xlarge", "us-east-1", True, 1]])
