"""Energy per token."""

from __future__ import annotations

import statistics

from jobs.materials import Target
from jobs.measurement import energy_counters
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.measurement.timing import Part
from jobs.models.families import TASKS


def measure(subject: ShippedModel) -> Measurement:
    """Measure token_joules: the energy per new token, or per input token of an encoder or classifier.

    The counters include all that the machine's processors and GPUs draw. The value is the median over the timing
    processes; the error is half of their range.
    """
    part: Part = "prefill"
    if subject.materials.new_tokens:
        part = "decode"
    chosen = subject.timed.chosen(part)
    joules = [timings.token_joules for timings in chosen if timings.token_joules is not None]
    if not joules:
        raise ValueError(f"token_joules cannot be measured here: {missing(subject.materials.target)}")
    unreliable: tuple[str, ...] = ()
    if not subject.timed.reliable(part):
        unreliable = ("token_joules",)
    error = (max(joules) - min(joules)) / 2
    return Measurement({"token_joules": statistics.median(joules)}, {"token_joules": error}, unreliable)


def missing(target: Target) -> str | None:
    """Return the reason why energy cannot be measured here, or None."""
    return energy_counters.missing()


METER = Meter(metrics=("token_joules",), tasks=TASKS, measure=measure, exclusive=True, missing=missing)
