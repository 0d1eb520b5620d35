"""Nodes of a real Ray that are taken away: their workers and Ray learn of it, whichever has the notice first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cluster.clouds import Ec2, served

pytestmark = pytest.mark.ray

# A cluster of a head and two nodes: one is ended as pods are, the cloud gives notice of the other. Prints all notices.
PROGRAM = """
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.on_ray.cluster_state import ClusterMonitor
from cluster.on_ray.connection import connect
from cluster.on_ray.worker import Worker
from cluster.cloud.preemption import latest_notice

def sources():
    notice = latest_notice()
    return None if notice is None else (notice.source, notice.seconds_left)

def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value

ray, _ = connect("local", 1, 0)
monitor = ClusterMonitor(ray)
address = ray.get_runtime_context().gcs_address
start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block",
         "--object-store-memory=80000000"]
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
nodes = {}
try:
    # One after another: nodes that start at the same time on one machine take each other's ports.
    for name in ("pod", "spot"):
        nodes[name] = subprocess.Popen([*start, "--resources", json.dumps({name: 1})], **quiet)
        until(lambda: name in ray.cluster_resources())
    ids = {name: next(node["NodeID"] for node in ray.nodes() if name in node["Resources"]) for name in nodes}
    workers = {}
    for name, service in {"pod": "http://127.0.0.1:9", "spot": sys.argv[1]}.items():
        services = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service, "GCE_METADATA_HOST": "127.0.0.1:9"}
        options = dict(num_cpus=1, resources={name: 1}, runtime_env={"env_vars": services})
        workers[name] = ray.remote(Worker).options(**options).remote()
    pickled = ray.cloudpickle.dumps(sources)
    ask = lambda name: ray.get(workers[name].run.remote("", pickled, ())).value
    first = [ask(name) for name in nodes], sorted(monitor.snapshot().draining_nodes)
    print("ready", flush=True)
    sys.stdin.readline()
    nodes["pod"].send_signal(signal.SIGTERM)
    notices = {name: until(lambda: ask(name)) for name in nodes}
    drained = until(lambda: monitor.snapshot().draining_nodes == set(ids.values()))
    for worker in workers.values():
        ray.kill(worker)
    ended = until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    print(json.dumps({"first": first, "notices": notices, "drained": drained, "ended": ended}))
finally:
    for node in nodes.values():
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    ray.shutdown()
"""


def test_a_worker_learns_that_its_node_will_end_and_ray_places_nothing_there() -> None:
    ec2 = Ec2()
    with served(ec2) as address:
        driver = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        with driver:
            assert driver.stdout is not None
            assert driver.stdin is not None
            assert driver.stdout.readline() == "ready\n"
            ec2.take_away(seconds=120)
            output = json.loads(driver.communicate("go\n", timeout=150)[0])
    assert output["first"] == [[None, None], []]
    source, seconds_left = output["notices"]["pod"]
    assert source == "Ray"
    assert 0 < seconds_left <= 30
    source, seconds_left = output["notices"]["spot"]
    assert source == "EC2 (terminate)"
    assert 60 < seconds_left <= 120
    assert output["drained"]
    assert output["ended"]
