"""How much memory the artifact needs to run."""

from __future__ import annotations

from jobs.materials import Target
from jobs.measurement import machine
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.models.families import TASKS


def measure(subject: Subject) -> Measurement:
    """memory_gib: the most that the process of the target's runtime ever held in memory, loading included. With
    the interpreter and its libraries, some 0.3 GiB that are the same for every artifact, and with what it reads
    through mapped files. The median over the processes that were timed; the error is half of their difference."""
    held = sorted(one.peak_bytes / 2**30 for one in subject.timed.tries if one.peak_bytes is not None)
    if not held:
        raise ValueError(f"memory_gib cannot be measured here: {missing(subject.materials.target)}")
    return Measurement({"memory_gib": held[len(held) // 2]}, {"memory_gib": (held[-1] - held[0]) / 2})


def missing(target: Target) -> str | None:
    if machine.peak_memory_bytes() is None:
        return "this system does not tell the peak of a process (no VmHWM in /proc/self/status)"
    return None


METER = Meter(metrics=("memory_gib",), tasks=TASKS, measure=measure, exclusive=True, missing=missing)
