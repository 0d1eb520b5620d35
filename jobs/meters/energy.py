"""How much energy the artifact takes."""

from __future__ import annotations

import statistics

from jobs.materials import Target
from jobs.measurement import energy_counters
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.measurement.timing import Part
from jobs.models.families import TASKS


def measure(subject: Subject) -> Measurement:
    """token_joules: for each new token, of an encoder or a classifier for each token it reads. All that the
    machine's processors and GPUs draw meanwhile, so only on a machine that does nothing else. The median over the
    processes that were timed; the error is half of their difference."""
    part: Part = "decode" if subject.materials.new_tokens else "prefill"
    drawn = [one.token_joules for one in subject.timed.chosen(part) if one.token_joules is not None]
    if not drawn:
        raise ValueError(f"token_joules cannot be measured here: {missing(subject.materials.target)}")
    unreliable = () if subject.timed.reliable(part) else ("token_joules",)
    error = (max(drawn) - min(drawn)) / 2
    return Measurement({"token_joules": statistics.median(drawn)}, {"token_joules": error}, unreliable)


def missing(target: Target) -> str | None:
    return energy_counters.missing()


METER = Meter(metrics=("token_joules",), tasks=TASKS, measure=measure, exclusive=True, missing=missing)
