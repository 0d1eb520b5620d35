"""Metric names and values as text for people, with units."""

from __future__ import annotations

UNITS = {"_bytes": ("MB", 1e-6), "_ms": ("ms", 1.0), "_gib": ("GiB", 1.0), "_joules": ("J", 1.0)}
"""The unit and the factor to convert to it, by the suffix of a metric's name."""


def display_unit(metric: str) -> tuple[str, float]:
    """Return the unit in which a metric is shown, and the factor to convert to it."""
    return next((unit for suffix, unit in UNITS.items() if metric.endswith(suffix)), ("", 1.0))


def metric_label(metric: str) -> str:
    """Return the name of a metric without its unit, in words."""
    for suffix in UNITS:
        metric = metric.removesuffix(suffix)
    return metric.replace("_", " ")


def metric_value(metric: str, value: float, with_unit: bool = True) -> str:
    """Return the value in the unit of the metric."""
    unit, factor = display_unit(metric)
    scaled = value * factor
    digits = 3
    if abs(scaled) >= 10 or unit:
        digits = 2
    if abs(scaled) >= 100:
        digits = 1
    text = f"{scaled:,.{digits}f}"
    if unit and with_unit:
        text += f" {unit}"
    return text
