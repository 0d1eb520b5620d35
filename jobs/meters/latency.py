"""How long the artifact takes to answer: the prompt at once, then token by token."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from jobs import models
from jobs.job import Measurement
from jobs.meter import Meter, Subject
from jobs.stopwatch import Request, Timings, time_artifact

_TRIES = 3
_PATIENCE_S = 60.0
"""No try is begun after so long: on a machine that stays busy, more would only take longer."""
_SPREAD = 0.10
"""The largest spread, relative to the median, of a timing that can be compared with others."""
_OTHERS = 0.10
"""The largest share of the processors' time that other processes may have taken."""


def measure(subject: Subject) -> Measurement:
    """prefill_ms: for `prompt_tokens` at once; decode_ms: for each of `new_tokens` after them, with a KV
    cache. Medians, with the 90th percentiles beside them; see `time_quietly`."""
    return time_quietly(subject, subject.materials.target.new_tokens)


def time_quietly(subject: Subject, new_tokens: int) -> Measurement:
    """Time the artifact in the target's runtime until machine and timings are quiet, up to three times.

    The error of each metric is its spread: half of the interquartile range of the single timings. Single
    outliers, which every machine has, show in the 90th percentile and do not move a median. Where no try
    was quiet, the one of the least spread stands and is marked unreliable.
    """
    target = subject.materials.target
    vocabulary = models.vocabulary(subject.original)
    request = Request(
        str(subject.shipped), target.runtime, target.threads, target.prompt_tokens, new_tokens, vocabulary
    )
    started = time.monotonic()
    tries = [summary(time_artifact(request))]
    while tries[-1].unreliable and len(tries) < _TRIES and time.monotonic() - started < _PATIENCE_S:
        tries.append(summary(time_artifact(request)))
    return min(tries, key=lambda one: (len(one.unreliable), _worst_spread(one)))


def summary(timings: Timings) -> Measurement:
    """Median, spread and 90th percentile of what was timed, and which of them are too noisy."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    noisy: list[str] = []
    for part, milliseconds in (("prefill", timings.prefill_ms), ("decode", timings.decode_ms)):
        if not milliseconds:
            continue
        low, middle, high, tail = (float(value) for value in np.percentile(milliseconds, [25, 50, 75, 90]))
        found = {f"{part}_ms": middle, f"{part}_p90_ms": tail}
        metrics |= found
        errors[f"{part}_ms"] = (high - low) / 2
        if errors[f"{part}_ms"] > _SPREAD * middle or timings.others > _OTHERS:
            noisy += found
    return Measurement(metrics, errors, tuple(noisy))


def _worst_spread(measurement: Measurement) -> float:
    return max(error / measurement.metrics[name] for name, error in measurement.errors.items())


def metrics_of(parts: Iterable[str]) -> tuple[str, ...]:
    """The names of what is measured of each part."""
    return tuple(name for part in parts for name in (f"{part}_ms", f"{part}_p90_ms"))


METER = Meter(
    metrics=metrics_of(["prefill", "decode"]), tasks=("causal-lm",), measure=measure, exclusive=True
)
