"""Measure: all that a job asks to know of one artifact, with where it was measured."""

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
from jobs.measurement.meter import Subject


def measure(names: Sequence[str], subject: Subject) -> Measurement:
    """What these meters measure, as one measurement, with environment and seconds filled in."""
    started = time.perf_counter()
    found = Measurement({})
    for name in names:
        found = found.joined(meters.load(name).measure(subject))
    return dataclasses.replace(
        found,
        environment={**found.environment, **environment(subject.materials.target)},
        seconds=time.perf_counter() - started,
    )


def environment(target: Target) -> Mapping[str, str]:
    """What decides a number besides the artifact: the machine and the libraries."""
    gpu = {"gpu": torch.cuda.get_device_name()} if target.runtime == "cuda" else {}
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
    """The processor's name as the system tells it; platform.processor() is empty on most Linuxes."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
