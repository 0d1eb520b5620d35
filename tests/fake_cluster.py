"""Real Ray clusters on this machine: a head that asks for a token, and nodes that its autoscaler starts and ends.

The nodes are raylets of their own, made by Ray's provider for tests where a cloud's would make machines: the head, its
autoscaler, the scheduler and what runs on the nodes are what they are on a cloud. All nodes share this machine's
processors, files and address. Nothing calls `ray stop`, so several may run beside each other.
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
"""The provider gives its nodes the numbers that follow."""
HEAD_TYPE = "ray.head.default"
STORE_BYTES = 80 * 2**20
"""Of each node's object store, which takes /dev/shm: results of ours are small."""
STARTING_SECONDS = 120.0


@dataclass(frozen=True)
class NodeType:
    """What the autoscaler may start: at least `least` and at most `most` nodes of this kind. Each says to have so much,
    whatever this machine has."""

    cpus: int = 1
    gpus: int = 0
    memory_gib: int = 4
    labels: Mapping[str, str] = field(default_factory=dict)
    least: int = 0
    most: int = 4


@dataclass(frozen=True)
class Node:
    """A worker node that is up: the process of its raylet. began: seconds since the epoch."""

    id: str
    type: str
    pid: int
    began: float


@dataclass(frozen=True)
class Head:
    """A Ray that asks for a token: the address of its dashboard, that of its core, the environment of who may use it,
    and the process from which all of it descends."""

    address: str
    gcs: str
    env: Mapping[str, str]
    process: psutil.Popen
    log: Path

    def slimfront(self, *args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command against this cluster to its end."""
        return slimfront(self.address, {**self.env, **env}, cwd, *args)

    def command(self, *args: object) -> list[str]:
        return command(self.address, *args)

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        token = {"Authorization": f"Bearer {Path(self.env['RAY_AUTH_TOKEN_PATH']).read_text()}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.address + path, headers=token), timeout=30
        ) as answer:
            return json.load(answer)

    def nodes(self) -> list[Node]:
        """The worker nodes whose raylet lives, as the operating system tells; one that was just started may not have
        joined the cluster yet."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() != "raylet" or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                told = process.environ()
                id = told.get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", HEAD_ID)
                if id != HEAD_ID:
                    type = told.get("RAY_NODE_TYPE_NAME", "")
                    found.append(Node(id, type, process.pid, process.create_time()))
        return sorted(found, key=lambda node: node.began)

    def kill(self, node: Node) -> None:
        """End a node's raylet at once. Ray's workers on it notice that by themselves, up to some 20 s later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(node.pid)
            if process.create_time() == node.began:
                process.kill()


def command(address: str, *args: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, args), "--address", address]


def slimfront(
    address: str, env: Mapping[str, str], cwd: Path, *args: object
) -> subprocess.CompletedProcess[str]:
    """Run the command against the cluster at an address, to its end."""
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
    """A cluster of its own, which ends with the block. With `types` it grows and shrinks with what is asked of it, and
    its head takes no work unless it has `cpus`; without, it is a head of two processors alone. `env` is seen by all
    that runs on it."""
    folder = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))  # short: paths of Ray's sockets lie below it
    (folder / "token").write_text(secrets.token_hex(32))
    unset = {"AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}
    kept = {key: value for key, value in without_ray().items() if key not in unset}
    own = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1", **env,
    }  # fmt: skip
    port, dashboard, client = free_ports(3)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true",
        f"--num-cpus={cpus if cpus is not None else 0 if types else 2}",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", f"--object-store-memory={STORE_BYTES}",
    ]  # fmt: skip
    # A driver in a package must not find what is here.
    started = {key: value for key, value in own.items() if key != "PYTHONPATH"}
    if types:
        config = folder / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(types, idle_seconds, f"127.0.0.1:{port}")))
        command.append(f"--autoscaling-config={config}")
        started |= {**_AUTOSCALED, "PYTHONPATH": str(ROOT / "tests" / "nodes")}
    log = folder / "log"
    try:
        with running(command, log, folder, started) as process:
            found = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", own, process, log)
            wait_for("the head of a Ray", lambda: _answers(found), STARTING_SECONDS, process, log)
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_AUTOSCALED = {
    "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    # A node that is gone is seen to be within 9 s, not more than 60.
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


def _autoscaling(types: Mapping[str, NodeType], idle_seconds: float, gcs: str) -> dict[str, Any]:
    """What the head's autoscaler is told: as a file of Ray's cluster launcher would say it."""
    kinds = {
        name: {
            "resources": {
                "CPU": one.cpus, "memory": one.memory_gib * 2**30, "object_store_memory": STORE_BYTES,
                **({"GPU": one.gpus} if one.gpus else {}),
            },
            "labels": {"ray.io/node-group": name, **one.labels}, "node_config": {},
            "min_workers": one.least, "max_workers": one.most,
        }
        for name, one in types.items()
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
        "max_workers": sum(one.most for one in types.values()), "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_seconds / 60, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


def _answers(found: Head) -> bool:
    try:
        found.ask("/api/jobs/")
    except OSError:
        return False
    return True
