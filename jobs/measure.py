"""Take all meters of a job, and record the environment."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from jobs import meters, runtimes
from jobs.materials import Target
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel


def measure(names: Sequence[str], subject: ShippedModel) -> Measurement:
    """Return the results of these meters as one measurement, with its environment and duration."""
    started = time.perf_counter()
    measurement = Measurement({})
    for name in names:
        measurement = measurement.joined(meters.load(name).measure(subject))
    return dataclasses.replace(
        measurement,
        environment={**measurement.environment, **environment(subject.materials.target)},
        seconds=time.perf_counter() - started,
    )


def environment(target: Target) -> Mapping[str, str]:
    """Return the machine and the library versions, which affect a number as the artifact does."""
    gpu = {}
    if target.runtime == "cuda":
        gpu["gpu"] = torch.cuda.get_device_name()
    library = runtimes.load(target.runtime).LIBRARY
    return {
        **gpu,
        library: version(library),
        "cpu": _cpu_name(),
        "cpus": str(os.cpu_count()),
        "machine": platform.machine(),
        "system": platform.system(),
        "runtime": target.runtime,
        "threads": str(target.threads),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _cpu_name() -> str:
    """Return the processor's name. platform.processor() is empty on most Linux systems."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
