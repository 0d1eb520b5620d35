"""An objective of the search: one metric that gets smaller or larger. Imports no library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """A metric, its direction and its limit."""

    metric: str
    goal: Literal["min", "max"] = "min"
    limit: float | None = None
    """The worst acceptable value, itself still acceptable; None accepts every value."""

    def __post_init__(self) -> None:
        if self.goal not in ("min", "max"):
            raise ValueError(f"the goal of {self.metric} is {self.goal!r}; it must be min or max")

    def broken_by(self, value: float) -> bool:
        """Whether the value is beyond the limit; a value equal to it is within."""
        return self.limit is not None and self.loss(value) > self.loss(self.limit)

    def loss(self, value: float) -> float:
        """The value with the sign that makes smaller better."""
        return value if self.goal == "min" else -value
