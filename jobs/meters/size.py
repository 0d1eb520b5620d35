"""How big the artifact is to ship."""

from __future__ import annotations

from jobs import formats
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.models.families import TASKS


def measure(subject: Subject) -> Measurement:
    """size_bytes: of the weight files that are shipped, as the file system counts them. Exact, so without an error."""
    return Measurement({"size_bytes": float(formats.size_of(subject.shipped, subject.format))})


METER = Meter(metrics=("size_bytes",), tasks=TASKS, measure=measure)
