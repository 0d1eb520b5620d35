"""The cluster of tests/fake_cluster.py behaves as a real one, and ends with all its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fake_cluster import Head, NodeType, head

pytestmark = pytest.mark.cluster

DRIVER = """
import json, os, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1, memory=2**30, label_selector={"ray.io/node-group": "small", "zone": "a"})
class Actor:
    def node_id(self):
        return ray.get_runtime_context().get_node_id()
actors = [Actor.remote() for _ in range(2)]
print(json.dumps(ray.get([actor.node_id.remote() for actor in actors])), flush=True)
print(json.dumps([node["Resources"]["memory"] for node in ray.nodes() if node["Resources"].get("CPU")]), flush=True)
sys.stdin.read()
"""


def until(happened: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)
    return happened()


def driver(cluster: Head) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.gcs], env=dict(cluster.env), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_cluster_grows_with_the_demand_loses_a_node_shrinks_and_ends_with_all_its_processes() -> None:
    types = {
        "small": NodeType(memory_gib=2, labels={"zone": "a"}, max_nodes=2),
        "other": NodeType(max_nodes=2),
    }
    with head(types, idle_seconds=3) as cluster:
        assert cluster.nodes() == []
        with driver(cluster) as running:
            assert running.stdout is not None
            used = json.loads(running.stdout.readline())
            nodes = cluster.nodes()
            assert sorted(node.id for node in nodes) == sorted(used)
            assert {node.type for node in nodes} == {"small"}
            assert set(json.loads(running.stdout.readline())) == {2 * 2**30}
            cluster.kill(nodes[0])
            assert until(lambda: nodes[0] not in cluster.nodes())
            assert nodes[1] in cluster.nodes()
            running.communicate()
        assert until(lambda: not cluster.nodes(), 30)
        everything = cluster.process.children(recursive=True)
        folder = cluster.log.parent
    assert [process for process in everything if process.is_running()] == []
    assert not folder.exists()


def test_two_clusters_run_at_the_same_time_and_end_independently(tmp_path: Path) -> None:
    with head() as first:
        with head() as second:
            assert first.address != second.address
        assert not psutil.pid_exists(second.process.pid)
        assert first.ask("/api/jobs/") == []
        assert os.path.isdir(first.log.parent)
