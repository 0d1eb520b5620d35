"""The cost of a million tokens at the price of the study."""

from __future__ import annotations

from jobs.materials import Target
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel
from jobs.meters.latency import summary
from jobs.models.families import TASKS


def measure(subject: ShippedModel) -> Measurement:
    """Measure cost_per_million_tokens: the target's price for the time of a million tokens, without batches.

    For causal models these are new tokens, one after the other; for encoders and classifiers, input tokens. The
    currency is that of the price.
    """
    price = subject.materials.target.price_per_hour
    if price is None:
        raise ValueError(f"cost_per_million_tokens cannot be measured: {missing(subject.materials.target)}")
    timing = summary(subject.timed)
    name, tokens = "prefill_ms", subject.materials.target.prompt_tokens
    if subject.materials.new_tokens:
        name, tokens = "decode_ms", 1
    factor = cost(price, 1.0) / tokens
    unreliable: tuple[str, ...] = ()
    if name in timing.unreliable:
        unreliable = ("cost_per_million_tokens",)
    return Measurement(
        {"cost_per_million_tokens": factor * timing.metrics[name]},
        {"cost_per_million_tokens": factor * timing.errors[name]},
        unreliable,
    )


def cost(price_per_hour: float, token_ms: float) -> float:
    """Return the cost of a million tokens that take `token_ms` each."""
    return price_per_hour * token_ms * 1e6 / 3.6e6


def missing(target: Target) -> str | None:
    """Return the reason why the cost cannot be computed, or None."""
    if target.price_per_hour is None:
        return "the study has no target.price_per_hour"
    return None


METER = Meter(
    metrics=("cost_per_million_tokens",), tasks=TASKS, measure=measure, exclusive=True, missing=missing
)
