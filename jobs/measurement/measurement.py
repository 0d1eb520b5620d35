"""The result of measuring one model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measurement:
    """The metrics of one artifact. Raises FloatingPointError for a NaN or infinite number."""

    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    """By metric: the standard error, or the spread of a timing (see the meter)."""
    unreliable: tuple[str, ...] = ()
    """Metrics that were too noisy to compare, and so keep the artifact off the front."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The machine and the libraries. Numbers of different environments are not compared."""
    seconds: float = 0.0
    """Duration of the measurement."""
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By metric, the contribution of each item of the evaluation (window, question, text), in the order of the data.
    Their mean is the metric. Two artifacts are compared item by item."""
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By name, values of each item (losses, answers) for metrics that are not plain means of them. Together with
    `items`, they let a longer measurement continue. Only the store keeps them."""

    def __post_init__(self) -> None:
        for name, value in {**self.metrics, **self.errors}.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} came out as {value}: the model diverged")

    def joined(self, other: Measurement) -> Measurement:
        """Return both measurements of one artifact as one. The other's numbers take precedence."""
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
    """Return the items of a metric as if only the first `count` had been measured.

    Items of perplexity are linear in the losses around the mean m of all, exp(m) (1 + l - m), and are shifted to the
    mean of the first ones. Items of other metrics that are not means (F1) stay as they are, which is right to first
    order.
    """
    items = measurement.items.get(metric, ())
    if metric != "perplexity" or count >= len(items):
        return items[:count]
    whole = measurement.metrics[metric]
    losses = [item / whole - 1 for item in items[:count]]
    mean = statistics.fmean(losses)
    return [whole * math.exp(mean) * (1 + loss - mean) for loss in losses]


def standard_error(items: Sequence[float]) -> float:
    """Return the standard error of the items' mean; 0 for a single item."""
    if len(items) < 2:
        return 0.0
    mean = statistics.fmean(items)
    return math.sqrt(math.fsum((item - mean) ** 2 for item in items) / (len(items) - 1) / len(items))
