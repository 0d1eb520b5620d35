"""What a million tokens cost, at the price that the study gives."""

from __future__ import annotations

from jobs.materials import Target
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject
from jobs.meters.latency import summary
from jobs.models.families import TASKS


def measure(subject: Subject) -> Measurement:
    """cost_per_million_tokens: the target's price for the time that a million new tokens take one after the other,
    of an encoder or a classifier a million tokens that it reads; in the price's currency, without batches."""
    price = subject.materials.target.price_per_hour
    if price is None:
        raise ValueError(f"cost_per_million_tokens cannot be measured: {missing(subject.materials.target)}")
    timing = summary(subject.timed)
    name, tokens = (
        ("decode_ms", 1)
        if subject.materials.new_tokens
        else ("prefill_ms", subject.materials.target.prompt_tokens)
    )
    factor = cost(price, 1.0) / tokens
    return Measurement(
        {"cost_per_million_tokens": factor * timing.metrics[name]},
        {"cost_per_million_tokens": factor * timing.errors[name]},
        ("cost_per_million_tokens",) if name in timing.unreliable else (),
    )


def cost(price_per_hour: float, token_ms: float) -> float:
    """Of a million tokens, each of which takes so long."""
    return price_per_hour * token_ms * 1e6 / 3.6e6


def missing(target: Target) -> str | None:
    return None if target.price_per_hour is not None else "the study gives no target.price_per_hour"


METER = Meter(
    metrics=("cost_per_million_tokens",), tasks=TASKS, measure=measure, exclusive=True, missing=missing
)
