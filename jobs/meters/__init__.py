"""One file, one meter: each module defines METER, with its metrics and tasks."""

from __future__ import annotations

import importlib
import pkgutil

from jobs.measurement.meter import Meter
from jobs.models.families import Task


def names() -> list[str]:
    """Return all meters, from the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Meter:
    """Return the METER of `jobs/meters/NAME.py`."""
    meter = importlib.import_module(f"{__name__}.{name}").METER
    if not isinstance(meter, Meter):
        raise LookupError(f"{__name__}.{name}.METER is no Meter")
    return meter


def meter_of(metric: str, task: Task) -> str:
    """Return the name of the meter of a metric for a task. LookupError lists the metrics of the task."""
    metrics: list[str] = []
    for name in names():
        meter = load(name)
        if task in meter.tasks:
            if metric in (*meter.metrics, *meter.diagnostics):
                return name
            metrics += meter.metrics
    raise LookupError(
        f"nothing measures {metric!r} for task {task} (there are: {', '.join(sorted(metrics))})"
    )
