"""The result of measuring one model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measurement:
    """Numbers that were measured on an artifact, none of them NaN or infinite.

    metrics, errors: by metric name; an error is a standard error, for timings the spread (see the meter).
    unreliable: metrics that were too noisy to compare, which keeps them off the front.
    items: by metric, what each item of the evaluation (a window, a question, a text) adds to it, in the order of the
    data: their mean is the metric, and two artifacts are compared item by item.
    environment: where it was measured; numbers of different environments are not compared.
    seconds: how long measuring took.
    observed: by name, what was seen of each item where no metric is the plain mean of that (losses, answers). With the
    items of those that are, all that a longer measurement needs to know of these items; kept in the store alone.
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    unreliable: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {**self.metrics, **self.errors}.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} came out as {value}: the model diverged")

    def joined(self, other: Measurement) -> Measurement:
        """Both measurements of one artifact as one; the other's numbers win."""
        return Measurement(
            {**self.metrics, **other.metrics},
            {**self.errors, **other.errors},
            tuple(sorted({*self.unreliable} - {*other.metrics} | {*other.unreliable})),
            {**self.environment, **other.environment},
            self.seconds + other.seconds,
            {**self.items, **other.items},
            {**self.observed, **other.observed},
        )


def first_items(measurement: Measurement, metric: str, count: int) -> Sequence[float]:
    """The items of a metric as if no more than the first so many had been measured.

    Those of perplexity are linear in losses about the mean of all, exp(m) (1 + l - m), and are moved to the mean of the
    first. Those of other metrics that are no means (F1) stay as they are, which is right to first order.
    """
    items = measurement.items.get(metric, ())
    if metric != "perplexity" or count >= len(items):
        return items[:count]
    whole = measurement.metrics[metric]
    losses = [item / whole - 1 for item in items[:count]]
    mean = statistics.fmean(losses)
    return [whole * math.exp(mean) * (1 + loss - mean) for loss in losses]


def standard_error(items: Sequence[float]) -> float:
    """Of the items' mean; 0 for a single one, which says nothing about spread."""
    if len(items) < 2:
        return 0.0
    mean = statistics.fmean(items)
    return math.sqrt(math.fsum((item - mean) ** 2 for item in items) / (len(items) - 1) / len(items))
