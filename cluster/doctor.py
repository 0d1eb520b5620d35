"""Doctor: what this machine, a cluster and a store offer to work, and what would be in its way."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from cluster.executors.executor import Resources, cores
from cluster.on_ray.connection import OBJECT_STORE_BYTES
from cluster.on_ray.executor import RayExecutor
from cluster.on_ray.jobs_api import Jobs, JobState, Node
from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import check_store, is_remote, open_store
from cluster.storage.store import ArtifactStore

PROBE_BYTES = 8 * 10**6
"""What is put into a store and fetched, to see how fast that goes."""
SHARED_MEMORY = Path("/dev/shm")


class Fact(NamedTuple):
    """One thing found. `hint` says what to do where it is not `ok`."""

    what: str
    value: str
    ok: bool = True
    hint: str = ""


def facts() -> list[Fact]:
    """What can be seen without starting anything."""
    return [
        Fact("python", platform.python_version()),
        processors(cores()),
        memory(psutil.virtual_memory().available),
        *([shared_memory(shutil.disk_usage(SHARED_MEMORY).free)] if SHARED_MEMORY.is_dir() else []),
        disk(shutil.disk_usage(tempfile.gettempdir()).free),
        Fact("ray", metadata.version("ray")),
        Fact("gpus", str(gpus())),
    ]


def processors(count: int) -> Fact:
    return Fact("processors", str(count), count >= 2, "with one, measuring latency and all else take turns")


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
    """For models in a store that is a folder here."""
    hint = "slimfront store FOLDER --trim SIZE removes what can be made again"
    return Fact("room for models", f"{free_bytes / 2**30:.1f} GiB free", free_bytes >= 5 * 2**30, hint)


def gpus() -> int:
    """How many GPUs NVIDIA's driver sees; 0 without its tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def ray_works() -> Fact:
    """Start Ray here, let one worker answer, and end it: takes some seconds."""
    try:
        executor = RayExecutor(slots=1, gpus=0, address="local")
        try:
            executor.submit("hello", platform.python_version, resources=Resources())
            ended = executor.wait(timeout=60)
        finally:
            executor.close()
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        return Fact(
            "local ray", f"{type(error).__name__}: {error}", False, "see the newest folder in /tmp/ray"
        )
    if [one.value for one in ended] == [platform.python_version()]:
        return Fact("local ray", "starts and works")
    lost = ended[0].error if ended else "no worker answered within a minute"
    return Fact("local ray", str(lost), False, f"workers must import this package with {sys.executable}")


def of_cluster(address: str, insecure: bool) -> Iterator[Fact]:
    """What the cluster at this address is and has now. Starts nothing there."""
    try:
        jobs = Jobs(address, insecure)
        there, scaling, submitted = jobs.nodes(), jobs.scaling(), jobs.all()
    except (OSError, RuntimeError, ValueError) as error:
        yield Fact("cluster", str(error), False)
        return
    python = ".".join(platform.python_version_tuple()[:2])
    yield Fact("cluster", f"{jobs.address} answers")
    yield Fact(
        "token",
        "none is asked for: whoever reaches it may run anything" if insecure else "asked for, and taken",
    )
    yield Fact("versions", f"Ray {metadata.version('ray')} and Python {python}, as here")
    yield from nodes(there)
    yield from autoscaler(scaling)
    yield studies(submitted)


def nodes(there: Sequence[Node]) -> Iterator[Fact]:
    """How many nodes of each kind are up, and whether the head is kept from work."""
    kinds = Counter(("head" if one.head else one.type or "worker", _has(one)) for one in there)
    yield Fact("nodes", "; ".join(f"{count} {kind} ({has})" for (kind, has), count in kinds.items()))
    yield Fact("gpus", f"{sum(one.gpus for one in there):g}")
    working = [one for one in there if one.head and one.cpus]
    if working and len(there) > 1:
        hint = "start it with --num-cpus=0: work that fills its memory ends the cluster"
        yield Fact("head", "takes work too", True, hint)


def autoscaler(said: str) -> Iterator[Fact]:
    """What is on its way, what failed lately, and what waits for room, as far as there is any."""
    hints = {
        "Pending:": "",
        "Recent failures:": "the cloud's quota, or no room there: another instance type, zone or region",
        "Pending Demands:": "no node may be large enough, or all are busy: slimfront doctor --template FILE",
    }
    for header, hint in hints.items():
        found = re.search(rf"^{header}\n((?: .*\n?)*)", said, re.MULTILINE)
        lines = [line.strip() for line in found[1].splitlines()] if found else []
        if lines and not lines[0].startswith("(no "):
            yield Fact(header.rstrip(":").lower(), "; ".join(lines), not header.startswith("Recent"), hint)


def studies(submitted: Sequence[JobState]) -> Fact:
    counts = Counter(one.status.lower() for one in submitted)
    return Fact("jobs", ", ".join(f"{count} {status}" for status, count in counts.items()) or "none")


def of_store(address: str) -> Iterator[Fact]:
    """What can be done in the store at this address, and how fast, tried with a record and an artifact of our own that
    are removed again. A folder that is not there is made."""
    try:
        check_store(address)
        allowed = Fact("all that a study does", "works")
    except (OSError, ValueError) as error:
        if not (isinstance(error, PermissionError) and is_remote(address)):
            yield Fact("store", str(error), False)
            return
        allowed = Fact("all that a study does", str(error), False, "allow it; what else works is below")
    yield Fact("store", address.partition("?")[0])
    yield allowed
    store = open_store(address)
    if not is_remote(address):
        yield room(shutil.disk_usage(Path(address).expanduser()).free)
    with tempfile.TemporaryDirectory() as folder:
        yield from _tried(store, Path(folder))


def _tried(store: ArtifactStore, scratch: Path) -> Iterator[Fact]:
    key = f"probe/{uuid.uuid4().hex}"
    (scratch / "out").mkdir()
    (scratch / "out" / "bytes").write_bytes(os.urandom(PROBE_BYTES))
    put: list[ArtifactRef] = []
    try:
        yield _timed("create a record only if absent", lambda: _created_once(store, key))
        yield _timed("read it", lambda: store.record(key) == {"probe": 1})
        yield _timed("list records", lambda: list(store.records("probe/")).count(key) == 1)
        yield _timed("put 8 MB", lambda: put.append(store.put(scratch / "out")), PROBE_BYTES)
        if put:
            yield _timed("fetch them", lambda: store.fetch(put[0], scratch / "in"), PROBE_BYTES)
    finally:
        yield _timed("remove both", lambda: _remove(store, key, put))


def _remove(store: ArtifactStore, key: str, put: Sequence[ArtifactRef]) -> None:
    store.forget(key)
    for ref in put:
        store.remove(ref)


def _created_once(store: ArtifactStore, key: str) -> bool:
    return store.commit(key, {"probe": 1}) and not store.commit(key, {"probe": 2})


def _timed(what: str, do: Callable[[], object], size_bytes: int = 0) -> Fact:
    """Do it once; what came out is wrong only where it is False."""
    began = time.perf_counter()
    try:
        right = do() is not False
    except (LookupError, OSError) as error:
        return Fact(what, str(error), False)
    seconds = time.perf_counter() - began
    speed = f", {size_bytes / 1e6 / seconds:.0f} MB/s" if size_bytes else ""
    if not right:
        return Fact(what, "not what was expected came out", False, "use a store that heeds what it is told")
    return Fact(what, f"{seconds * 1000:.0f} ms{speed}")


def _has(node: Node) -> str:
    gpus = f", {node.gpus:g} GPUs" if node.gpus else ""
    return f"{node.cpus:g} CPUs{gpus}, {node.memory_gib:.0f} GiB"
