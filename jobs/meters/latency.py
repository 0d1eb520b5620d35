"""How long the artifact takes to answer: the prompt at once, then token by token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.measurement.timing import PARTS, Timed, median_ms, milliseconds, spread


def measure(subject: Subject) -> Measurement:
    """prefill_ms: for `prompt_tokens` at once; decode_ms: for each of `new_tokens` after them, with a KV
    cache. Medians, with the 90th percentiles beside them; see `summary`."""
    return summary(subject.timed)


def summary(timed: Timed) -> Measurement:
    """The median process's median and 90th percentile of each part, and which of them are too noisy.

    The error of a median is its spread: half of the interquartile range of the single timings, or of the
    difference between the processes where that is more. load_share: of the processors' time, what other processes
    took; cpu_mhz: the processors' frequency, where the system tells it.
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    unreliable: list[str] = []
    for part in PARTS:
        if not milliseconds(timed.tries[0], part):
            continue
        chosen = timed.chosen(part)
        medians = [median_ms(one, part) for one in chosen]
        tails = [float(np.percentile(milliseconds(one, part), 90)) for one in chosen]
        found = {f"{part}_ms": float(np.median(medians)), f"{part}_p90_ms": float(np.median(tails))}
        metrics |= found
        within = float(np.median([spread(one, part) for one in chosen]))
        errors[f"{part}_ms"] = max(within, (max(medians) - min(medians)) / 2)
        if not timed.reliable(part):
            unreliable += found
    return Measurement({**metrics, **_machine(timed)}, errors, tuple(unreliable))


def metrics_of(parts: Iterable[str]) -> tuple[str, ...]:
    """The names of what is measured of each part."""
    return tuple(name for part in parts for name in (f"{part}_ms", f"{part}_p90_ms"))


MACHINE = ("load_share", "cpu_mhz")
"""What is told of the machine, where it can tell."""


def _machine(timed: Timed) -> dict[str, float]:
    chosen = timed.chosen("prefill")
    mhz = [one for timings in chosen for one in timings.mhz]
    found = {"load_share": float(np.median([one.others for one in chosen]))}
    return {**found, "cpu_mhz": float(np.median(mhz))} if mhz else found


METER = Meter(
    metrics=metrics_of(["prefill", "decode"]),
    diagnostics=MACHINE,
    tasks=("causal-lm",),
    measure=measure,
    exclusive=True,
)
