"""One file, one meter: each module's METER says what it measures, for which tasks."""

from __future__ import annotations

import importlib
import pkgutil

from jobs.measurement.meter import Meter
from jobs.models.families import Task


def names() -> list[str]:
    """Every meter there is, read from the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Meter:
    """The METER of `jobs/meters/NAME.py`."""
    meter = importlib.import_module(f"{__name__}.{name}").METER
    if not isinstance(meter, Meter):
        raise LookupError(f"{__name__}.{name}.METER is no Meter")
    return meter


def meter_of(metric: str, task: Task) -> str:
    """The name of the meter that produces `metric` for `task`; LookupError lists what can be measured."""
    known: list[str] = []
    for name in names():
        meter = load(name)
        if task in meter.tasks:
            if metric in (*meter.metrics, *meter.diagnostics):
                return name
            known += meter.metrics
    raise LookupError(f"nothing measures {metric!r} for task {task} (there are: {', '.join(sorted(known))})")
