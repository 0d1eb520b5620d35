"""Doctor: the resources of this machine, a cluster and a store, and problems that would stop a study."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from cluster.executors.executor import cores
from cluster.on_ray.connection import OBJECT_STORE_BYTES
from cluster.on_ray.jobs_api import Jobs, JobState, Node
from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import check_store, is_remote, open_store
from cluster.storage.store import ArtifactStore

PROBE_BYTES = 8 * 10**6
"""The size of the artifact with which the speed of a store is measured."""
SHARED_MEMORY = Path("/dev/shm")


class Fact(NamedTuple):
    """The result of one check."""

    what: str
    """The name of the checked property."""
    value: str
    ok: bool = True
    hint: str = ""
    """The remedy if the result is not `ok`."""


def facts() -> list[Fact]:
    """Check this machine, without starting anything."""
    checks = [
        Fact("python", platform.python_version()),
        processors(cores()),
        memory(psutil.virtual_memory().available),
    ]
    if SHARED_MEMORY.is_dir():
        checks.append(shared_memory(shutil.disk_usage(SHARED_MEMORY).free))
    checks += [
        disk(shutil.disk_usage(tempfile.gettempdir()).free),
        Fact("ray", metadata.version("ray")),
        Fact("gpus", str(gpus())),
    ]
    return checks


def processors(count: int) -> Fact:
    return Fact("processors", str(count), count >= 2, "with one, timings and all other tasks take turns")


def memory(available_bytes: int) -> Fact:
    value = f"{available_bytes / 2**30:.1f} GiB available"
    return Fact("memory", value, available_bytes >= 2 * 2**30, "Ray takes 0.5 GiB; end other programs")


def shared_memory(free_bytes: int) -> Fact:
    value = f"{free_bytes / 2**20:.0f} MiB free"
    hint = f"Ray keeps {OBJECT_STORE_BYTES // 2**20} MiB there; in a container give --shm-size=1g"
    return Fact("shared memory", value, free_bytes >= 2 * OBJECT_STORE_BYTES, hint)


def disk(free_bytes: int) -> Fact:
    value = f"{free_bytes / 2**30:.1f} GiB free in {tempfile.gettempdir()}"
    return Fact("temporary files", value, free_bytes >= 5 * 2**30, "make room, or set TMPDIR")


def room(free_bytes: int) -> Fact:
    """Check the free space for models in a store that is a folder of this machine."""
    hint = "slimfront store FOLDER --trim SIZE removes models that can be made again"
    return Fact("room for models", f"{free_bytes / 2**30:.1f} GiB free", free_bytes >= 5 * 2**30, hint)


def gpus() -> int:
    """Return the number of GPUs that NVIDIA's driver reports; 0 without its tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def of_cluster(address: str, insecure: bool) -> Iterator[Fact]:
    """Check the cluster at this address, without starting anything there."""
    try:
        jobs = Jobs(address, insecure)
        cluster_nodes, scaling, submitted = jobs.nodes(), jobs.scaling(), jobs.all()
    except (OSError, RuntimeError, ValueError) as error:
        yield Fact("cluster", str(error), False)
        return
    python = ".".join(platform.python_version_tuple()[:2])
    yield Fact("cluster", f"{jobs.address} answers")
    if insecure:
        yield Fact("token", "not required: any process that reaches the cluster may run programs on it")
    else:
        yield Fact("token", "required, and accepted")
    yield Fact("versions", f"Ray {metadata.version('ray')} and Python {python}, as on this machine")
    yield from nodes(cluster_nodes)
    yield from autoscaler(scaling)
    yield studies(submitted)


def nodes(cluster_nodes: Sequence[Node]) -> Iterator[Fact]:
    """Count the nodes of each type, and check that the head runs no tasks if there are other nodes."""
    kinds = Counter((_kind(node), _resources(node)) for node in cluster_nodes)
    counts = [f"{count} {kind} ({resources})" for (kind, resources), count in kinds.items()]
    yield Fact("nodes", "; ".join(counts))
    yield Fact("gpus", f"{sum(node.gpus for node in cluster_nodes):g}")
    if len(cluster_nodes) > 1 and any(node.head and node.cpus for node in cluster_nodes):
        hint = "start it with --num-cpus=0: tasks that fill its memory end the cluster"
        yield Fact("head", "runs tasks too", True, hint)


def autoscaler(report: str) -> Iterator[Fact]:
    """Return the pending nodes, the recent failures and the pending demands of an autoscaler's report, if any."""
    hints = {
        "Pending:": "",
        "Recent failures:": "the cloud's quota, or no capacity there: another instance type, zone or region",
        "Pending Demands:": "no node may be large enough, or all are busy: slimfront doctor --template FILE",
    }
    for header, hint in hints.items():
        section = re.search(rf"^{header}\n((?: .*\n?)*)", report, re.MULTILINE)
        if section is None:
            continue
        lines = [line.strip() for line in section[1].splitlines()]
        if lines and not lines[0].startswith("(no "):
            yield Fact(header.rstrip(":").lower(), "; ".join(lines), not header.startswith("Recent"), hint)


def studies(submitted: Sequence[JobState]) -> Fact:
    counts = Counter(job.status.lower() for job in submitted)
    return Fact("jobs", ", ".join(f"{count} {status}" for status, count in counts.items()) or "none")


def of_store(address: str) -> Iterator[Fact]:
    """Check the store at this address, and its speed, with a record and an artifact that are removed again.

    An absent folder is created.
    """
    try:
        check_store(address)
        permissions = Fact("all that a study does", "works")
    except (OSError, ValueError) as error:
        if not (isinstance(error, PermissionError) and is_remote(address)):
            yield Fact("store", str(error), False)
            return
        permissions = Fact("all that a study does", str(error), False, "allow it; what else works is below")
    yield Fact("store", address.partition("?")[0])
    yield permissions
    store = open_store(address)
    if not is_remote(address):
        yield room(shutil.disk_usage(Path(address).expanduser()).free)
    with tempfile.TemporaryDirectory() as folder:
        yield from _probe(store, Path(folder))


def _probe(store: ArtifactStore, scratch: Path) -> Iterator[Fact]:
    """Time each operation of a store once."""
    key = f"probe/{uuid.uuid4().hex}"
    (scratch / "out").mkdir()
    (scratch / "out" / "bytes").write_bytes(os.urandom(PROBE_BYTES))
    refs: list[ArtifactRef] = []
    try:
        yield _timed("create a record only if absent", lambda: _created_once(store, key))
        yield _timed("read it", lambda: store.record(key) == {"probe": 1})
        yield _timed("list records", lambda: list(store.records("probe/")).count(key) == 1)
        yield _timed("put 8 MB", lambda: refs.append(store.put(scratch / "out")), PROBE_BYTES)
        if refs:
            yield _timed("fetch them", lambda: store.fetch(refs[0], scratch / "in"), PROBE_BYTES)
    finally:
        yield _timed("remove both", lambda: _remove(store, key, refs))


def _remove(store: ArtifactStore, key: str, refs: Sequence[ArtifactRef]) -> None:
    store.forget(key)
    for ref in refs:
        store.remove(ref)


def _created_once(store: ArtifactStore, key: str) -> bool:
    return store.commit(key, {"probe": 1}) and not store.commit(key, {"probe": 2})


def _timed(name: str, operation: Callable[[], object], size_bytes: int = 0) -> Fact:
    """Run an operation once and report its time. A return value of False means a wrong result."""
    began = time.perf_counter()
    try:
        is_right = operation() is not False
    except (LookupError, OSError) as error:
        return Fact(name, str(error), False)
    seconds = time.perf_counter() - began
    if not is_right:
        return Fact(name, "returned a wrong result", False, "use a store that does as it is asked")
    speed = f", {size_bytes / 1e6 / seconds:.0f} MB/s" if size_bytes else ""
    return Fact(name, f"{seconds * 1000:.0f} ms{speed}")


def _kind(node: Node) -> str:
    if node.head:
        return "head"
    return node.type or "worker"


def _resources(node: Node) -> str:
    gpus = f", {node.gpus:g} GPUs" if node.gpus else ""
    return f"{node.cpus:g} CPUs{gpus}, {node.memory_gib:.0f} GiB"
