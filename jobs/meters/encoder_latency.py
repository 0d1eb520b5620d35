"""Latency of an encoder or classifier for one text."""

from __future__ import annotations

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.meters.latency import MACHINE_DIAGNOSTICS, metrics_of, summary


def measure(subject: ShippedModel) -> Measurement:
    """Measure prefill_ms for `prompt_tokens`, timed as in `jobs.meters.latency`."""
    return summary(subject.timed)


METER = Meter(
    metrics=metrics_of(["prefill"]),
    diagnostics=MACHINE_DIAGNOSTICS,
    tasks=("embedding", "classification"),
    measure=measure,
    exclusive=True,
)
