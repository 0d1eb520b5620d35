"""Doctor: what this machine offers to work, and what would be in its way."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from cluster.executor import Resources, cores
from cluster.head import OBJECT_STORE_BYTES
from cluster.on_ray import RayExecutor

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
    lost = ended[0].lost if ended else "no worker answered within a minute"
    return Fact("local ray", str(lost), False, f"workers must import this package with {sys.executable}")
