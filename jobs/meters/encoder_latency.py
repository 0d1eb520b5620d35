"""How long an encoder, or a classifier, takes for one text."""

from __future__ import annotations

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.meters.latency import MACHINE, metrics_of, summary


def measure(subject: Subject) -> Measurement:
    """prefill_ms: for `prompt_tokens` at once, timed as `latency` times a causal model."""
    return summary(subject.timed)


METER = Meter(
    metrics=metrics_of(["prefill"]),
    diagnostics=MACHINE,
    tasks=("embedding", "classification"),
    measure=measure,
    exclusive=True,
)
