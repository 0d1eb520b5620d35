"""Knobs: the options of techniques, each with its default, its domain of valid values and a help text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included."""

    low: float
    high: float
    integer: bool = False
    """Whether only whole numbers are valid."""
    log: bool = False
    """Whether a search should sample the logarithm of the value."""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.integer and value != int(value):
            return False
        return self.low <= value <= self.high

    def normal(self, value: Value) -> Value:
        """Return the value in its canonical type: 1 and 1.0 must not make two recipes."""
        if self.integer:
            return int(value)
        return float(value)

    def __str__(self) -> str:
        interval = f"[{self.low:g}, {self.high:g}]"
        if self.integer:
            return f"whole numbers in {interval}"
        return interval


@dataclass(frozen=True)
class Choice:
    """A finite set of values; numbers are in their natural order."""

    values: tuple[Value, ...]

    @property
    def ordered(self) -> bool:
        """Whether the values are numbers, so that near values have similar effects."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def __contains__(self, value: object) -> bool:
        # 1 == True in Python, but an option with numbers must refuse booleans, and the reverse.
        return any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.values
        )

    def normal(self, value: Value) -> Value:
        """Return the equal member of `values`."""
        return next(choice for choice in self.values if choice == value)

    def __str__(self) -> str:
        return "{" + ", ".join(str(value) for value in self.values) + "}"


Domain = Range | Choice


def profile(values: Sequence[Value]) -> Value:
    """Return the canonical form of an option that differs by block or linear.

    It is a text of the shortest list that expands to the same values, or the value itself where all are
    equal, so that equal settings have equal recipe ids. A list of n values is spread evenly over d parts,
    from the first to the last: part i has value ⌊i n / d⌋.
    """
    shortest = _shortest(values)
    if len(shortest) == 1:
        return shortest[0]
    return " ".join(map(str, shortest))


def _shortest(values: Sequence[Value]) -> Sequence[Value]:
    count = len(values)
    for length in range(1, count):
        width, remainder = divmod(count, length)
        if remainder == 0 and all(values[index] == values[index - index % width] for index in range(count)):
            return values[::width]
    return values


def profile_values(text: str, domain: Domain) -> tuple[Value, ...]:
    """Return the values of a profile; ValueError names the first value outside the domain."""
    return tuple(_number(word, domain) for word in text.split())


def _number(word: str, domain: Domain) -> Value:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if value not in domain:
        raise ValueError(f"{word} is outside {domain}")
    return domain.normal(value)


def knob(default: Value, domain: Domain, help: str) -> Any:
    """Return a dataclass field for an option; `help` describes its effect in one line."""
    return dataclasses.field(default=default, metadata={"domain": domain, "help": help})


def sequential_knob() -> Any:
    """Return the option that selects the activations which a layer-wise technique is calibrated on."""
    return knob(
        False,
        Choice((False, True)),
        "calibrate on the outputs of compressed blocks: often better, but candidates share no statistics",
    )
