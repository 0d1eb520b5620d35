"""Context: what a technique may use besides the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from jobs.models import Model
    from jobs.statistics import Statistics

Report = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done; each call renews the attempt's lease."""


@dataclass(frozen=True)
class Context:
    """Everything a technique may read. What its `needs` do not name may be missing.

    calibration, training: token ids, one sequence of equal length per row.
    teacher: loads the original model anew at each call; the caller owns it.
    """

    statistics: Statistics
    workdir: Path
    seed: int
    device: str = "cpu"
    calibration: Int[Tensor, "samples tokens"] | None = None
    training: Int[Tensor, "samples tokens"] | None = None
    teacher: Callable[[], Model] | None = None
    report: Report = lambda share, what: None
