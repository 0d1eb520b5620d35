"""How big the artifact is to ship."""

from __future__ import annotations

from jobs.families import TASKS
from jobs.job import Measurement
from jobs.meter import Meter, Subject


def measure(subject: Subject) -> Measurement:
    """size_bytes: of the weight files, as the file system counts them. Exact, so without an error."""
    files = sorted(subject.folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{subject.folder} holds no .safetensors weights to weigh")
    return Measurement({"size_bytes": float(sum(file.stat().st_size for file in files))})


METER = Meter(metrics=("size_bytes",), tasks=TASKS, measure=measure)
