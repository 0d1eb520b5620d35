"""Knobs: what values an option of a technique may validly take. What is *searched* is the study's to narrow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones only where `integer`."""

    low: float
    high: float
    integer: bool = False
    log: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.integer and value != int(value):
            return False
        return self.low <= value <= self.high

    def normal(self, value: Value) -> Value:
        """The value in its one spelling (1 and 1.0 must not make two recipes)."""
        return int(value) if self.integer else float(value)

    def __str__(self) -> str:
        kind = "whole numbers in " if self.integer else ""
        return f"{kind}[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Choice:
    """One of some values, in their natural order where they are numbers."""

    values: tuple[Value, ...]

    @property
    def ordered(self) -> bool:
        """Whether these are numbers, of which near ones do alike."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def __contains__(self, value: object) -> bool:
        # 1 == True in Python; an option that takes numbers must not take booleans, and the other way round.
        return any(
            value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values
        )

    def normal(self, value: Value) -> Value:
        """The value as it stands among the choices."""
        return next(known for known in self.values if known == value)

    def __str__(self) -> str:
        return "{" + ", ".join(str(value) for value in self.values) + "}"


Domain = Range | Choice


def profile(values: Sequence[Value]) -> Value:
    """The one spelling of numbers that differ by block or linear: a text of the fewest that say the same, and where
    all are alike that number itself, so that what does the same has one name.

    n values are spread evenly over the parts from the first to the last: part i of d takes number ⌊i n / d⌋.
    """
    count = len(values)
    for fewer in range(1, count):
        width, rest = divmod(count, fewer)
        if not rest and all(values[place] == values[place - place % width] for place in range(count)):
            return values[0] if fewer == 1 else " ".join(map(str, values[::width]))
    return values[0] if count == 1 else " ".join(map(str, values))


def profile_values(text: str, domain: Domain) -> tuple[Value, ...]:
    """The numbers of a profile; ValueError names one that is not in the domain."""
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
    """A dataclass field that holds an option: its default, its valid domain, and one line of what it does."""
    return dataclasses.field(default=default, metadata={"domain": domain, "help": help})


def sequential_knob() -> Any:
    """Whose activations a layer-wise technique goes by."""
    return knob(
        False,
        Choice((False, True)),
        "go by what compressed blocks before give: often better, and nothing is shared with other candidates",
    )
