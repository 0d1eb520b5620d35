"""Size of the shipped weight files."""

from __future__ import annotations

from jobs import formats
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.models.families import TASKS


def measure(subject: ShippedModel) -> Measurement:
    """Measure size_bytes: the sizes of the shipped weight files in the file system. Exact, so it has no error."""
    return Measurement({"size_bytes": float(formats.size_of(subject.shipped, subject.format))})


METER = Meter(metrics=("size_bytes",), tasks=TASKS, measure=measure)
