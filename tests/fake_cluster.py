"""Real Ray clusters on this machine: a head that requires a token, and nodes that its autoscaler starts and ends.

Each node is a raylet, started by Ray's provider for tests instead of a cloud's provider; the head, its autoscaler, the
scheduler and the workers are the same as on a cloud. All nodes share this machine's processors, files and address.
Nothing calls `ray stop`, so several clusters may run at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.processes import free_ports, running, wait_for, without_ray

ROOT = Path(__file__).parents[1]
HEAD_ID = "f" * 51 + "00000"
"""The provider numbers its nodes after this id."""
HEAD_TYPE = "ray.head.default"
STORE_BYTES = 80 * 2**20
"""The size of each node's object store in /dev/shm; our results are small."""
STARTING_SECONDS = 120.0


@dataclass(frozen=True)
class NodeType:
    """A type of node that the autoscaler may start. A node claims these resources, whatever this machine has."""

    cpus: int = 1
    gpus: int = 0
    memory_gib: int = 4
    labels: Mapping[str, str] = field(default_factory=dict)
    min_nodes: int = 0
    max_nodes: int = 4


@dataclass(frozen=True)
class Node:
    """A worker node that is up."""

    id: str
    type: str
    pid: int
    """The process of its raylet."""
    began: float
    """The start time of that process, in seconds since 1970."""


@dataclass(frozen=True)
class Head:
    """A Ray cluster that requires a token."""

    address: str
    """The address of its dashboard."""
    gcs: str
    """The address with which a driver connects."""
    env: Mapping[str, str]
    """The environment of a process that may use it."""
    process: psutil.Popen
    """The ancestor of all its processes."""
    log: Path

    def slimfront(self, *args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command slimfront with this cluster's address, and wait for its end."""
        return slimfront(self.address, {**self.env, **env}, cwd, *args)

    def command(self, *args: object) -> list[str]:
        return command(self.address, *args)

    def ask(self, path: str) -> Any:
        """Return the dashboard's answer."""
        token = {"Authorization": f"Bearer {Path(self.env['RAY_AUTH_TOKEN_PATH']).read_text()}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.address + path, headers=token), timeout=30
        ) as answer:
            return json.load(answer)

    def nodes(self) -> list[Node]:
        """Return the worker nodes whose raylet runs, as the operating system reports it.

        A new node may not have joined the cluster yet.
        """
        nodes = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() != "raylet" or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                environ = process.environ()
                id = environ.get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", HEAD_ID)
                if id != HEAD_ID:
                    type = environ.get("RAY_NODE_TYPE_NAME", "")
                    nodes.append(Node(id, type, process.pid, process.create_time()))
        return sorted(nodes, key=lambda node: node.began)

    def kill(self, node: Node) -> None:
        """Kill a node's raylet. Ray's workers on it end by themselves, up to some 20 s later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(node.pid)
            if process.create_time() == node.began:
                process.kill()


def command(address: str, *args: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, args), "--address", address]


def slimfront(
    address: str, env: Mapping[str, str], cwd: Path, *args: object
) -> subprocess.CompletedProcess[str]:
    """Run the command slimfront with the address of a cluster, and wait for its end."""
    done = subprocess.run(
        command(address, *args),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=dict(env),
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


@contextlib.contextmanager
def head(
    types: Mapping[str, NodeType] | None = None,
    idle_seconds: float = 8.0,
    cpus: int | None = None,
    **env: str,
) -> Iterator[Head]:
    """Start a cluster, which ends with the block.

    With `types` it grows and shrinks with the demand, and its head runs tasks only if it has `cpus`; without, it is a
    head with two processors. All its processes have the environment `env`.
    """
    folder = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))  # short: paths of Ray's sockets lie below it
    (folder / "token").write_text(secrets.token_hex(32))
    unset = {"AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}
    inherited = {key: value for key, value in without_ray().items() if key not in unset}
    environment = inherited | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1", **env,
    }  # fmt: skip
    port, dashboard, client = free_ports(3)
    if cpus is None:
        cpus = 0 if types else 2
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true",
        f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", f"--object-store-memory={STORE_BYTES}",
    ]  # fmt: skip
    # A driver in a package must not import the modules of this tree.
    started = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    if types:
        config = folder / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(types, idle_seconds, f"127.0.0.1:{port}")))
        command.append(f"--autoscaling-config={config}")
        started |= {**_AUTOSCALED, "PYTHONPATH": str(ROOT / "tests" / "nodes")}
    log = folder / "log"
    try:
        with running(command, log, folder, started) as process:
            cluster = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment, process, log)
            wait_for("the head of a Ray", lambda: _answers(cluster), STARTING_SECONDS, process, log)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_AUTOSCALED = {
    "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    # The head notices a lost node within 9 s, instead of 60 s.
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


def _autoscaling(types: Mapping[str, NodeType], idle_seconds: float, gcs: str) -> dict[str, Any]:
    """Return the configuration of the head's autoscaler, in the form of a launcher file."""
    kinds = {
        name: {
            "resources": _resources(node),
            "labels": {"ray.io/node-group": name, **node.labels}, "node_config": {},
            "min_workers": node.min_nodes, "max_workers": node.max_nodes,
        }
        for name, node in types.items()
    }  # fmt: skip
    provider = {
        "type": "external",
        "module": "fake_nodes.FakeNodes",
        "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
        "gcs_address": gcs, "launch_multiple": True, "head_node_id": HEAD_ID,
    }  # fmt: skip
    return {
        "cluster_name": "fake", "provider": provider, "auth": {}, "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **kinds,
        },
        "max_workers": sum(node.max_nodes for node in types.values()), "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_seconds / 60, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


def _resources(node: NodeType) -> dict[str, int]:
    amounts = {"CPU": node.cpus, "memory": node.memory_gib * 2**30, "object_store_memory": STORE_BYTES}
    if node.gpus:
        amounts["GPU"] = node.gpus
    return amounts


def _answers(cluster: Head) -> bool:
    try:
        cluster.ask("/api/jobs/")
    except OSError:
        return False
    return True
