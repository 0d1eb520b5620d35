"""Peak memory."""

from __future__ import annotations

from jobs.materials import Target
from jobs.measurement import machine
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.models.families import TASKS


def measure(subject: ShippedModel) -> Measurement:
    """Measure memory_gib: the peak memory of the timing process, including loading.

    It includes the interpreter and its libraries, some 0.3 GiB for every artifact, and pages of mapped files. The value
    is the median over the timing processes; the error is half of their range.
    """
    peaks = sorted(
        timings.peak_bytes / 2**30 for timings in subject.timed.tries if timings.peak_bytes is not None
    )
    if not peaks:
        raise ValueError(f"memory_gib cannot be measured here: {missing(subject.materials.target)}")
    return Measurement({"memory_gib": peaks[len(peaks) // 2]}, {"memory_gib": (peaks[-1] - peaks[0]) / 2})


def missing(target: Target) -> str | None:
    """Return the reason why memory cannot be measured here, or None."""
    if machine.peak_memory_bytes() is None:
        return "this system does not report the peak memory of a process (no VmHWM in /proc/self/status)"
    return None


METER = Meter(metrics=("memory_gib",), tasks=TASKS, measure=measure, exclusive=True, missing=missing)
