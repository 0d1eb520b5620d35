"""Latency of a causal model: the prompt at once, then token by token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.measurement.timing import PARTS, RepeatedTimings, median_ms, milliseconds, spread


def measure(subject: ShippedModel) -> Measurement:
    """Measure prefill_ms for `prompt_tokens`, and decode_ms for each of `new_tokens` after them, with a KV cache.

    Both are medians, with 90th percentiles; see `summary`.
    """
    return summary(subject.timed)


def summary(timed: RepeatedTimings) -> Measurement:
    """Return median and 90th percentile of each part over the processes, and the parts that are too noisy.

    The error of a median is the larger of half the interquartile range of the single timings and half the range of
    the processes' medians. load_share is the share of the processors' time that other processes used; cpu_mhz is the
    processors' frequency, if the system reports it.
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    unreliable: list[str] = []
    for part in PARTS:
        if not milliseconds(timed.tries[0], part):
            continue
        chosen = timed.chosen(part)
        medians = [median_ms(timings, part) for timings in chosen]
        tails = [float(np.percentile(milliseconds(timings, part), 90)) for timings in chosen]
        part_metrics = {f"{part}_ms": float(np.median(medians)), f"{part}_p90_ms": float(np.median(tails))}
        metrics |= part_metrics
        within = float(np.median([spread(timings, part) for timings in chosen]))
        errors[f"{part}_ms"] = max(within, (max(medians) - min(medians)) / 2)
        if not timed.reliable(part):
            unreliable += part_metrics
    return Measurement({**metrics, **_machine(timed)}, errors, tuple(unreliable))


def metrics_of(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the metrics of these parts."""
    return tuple(name for part in parts for name in (f"{part}_ms", f"{part}_p90_ms"))


MACHINE_DIAGNOSTICS = ("load_share", "cpu_mhz")
"""Facts about the machine, recorded if the system reports them."""


def _machine(timed: RepeatedTimings) -> dict[str, float]:
    chosen = timed.chosen("prefill")
    mhz = [frequency for timings in chosen for frequency in timings.mhz]
    diagnostics = {"load_share": float(np.median([timings.load_share for timings in chosen]))}
    if mhz:
        diagnostics["cpu_mhz"] = float(np.median(mhz))
    return diagnostics


METER = Meter(
    metrics=metrics_of(["prefill", "decode"]),
    diagnostics=MACHINE_DIAGNOSTICS,
    tasks=("causal-lm",),
    measure=measure,
    exclusive=True,
)
