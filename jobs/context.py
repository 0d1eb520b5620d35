"""The data and services that a technique gets besides the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from jobs.parallel import Sharing
from jobs.progress import Report, no_report

if TYPE_CHECKING:
    from jobs.calibration.statistics import Statistics
    from jobs.models.model import Model


@dataclass(frozen=True)
class Context:
    """The inputs of a technique. Optional fields may be None unless the technique's `needs` name them."""

    statistics: Statistics
    """Statistics of the parent model."""
    workdir: Path
    """A scratch folder of this attempt."""
    seed: int
    calibration: Int[Tensor, "samples tokens"] | None = None
    """Token ids, one sequence of equal length per row."""
    training: Int[Tensor, "samples tokens"] | None = None
    """Token ids, one sequence of equal length per row."""
    teacher: Callable[[], Model] | None = None
    """Loads a new copy of the original at each call, whole on its device. The caller owns it."""
    teacher_statistics: Statistics | None = None
    """Statistics that depend on the original and the training text alone, shared by all students."""
    checkpoints: Path | None = None
    """A folder for checkpoints of this recipe. It outlives the attempt."""
    sharing: Sharing = field(default_factory=Sharing)
    """How training is divided among ranks. It does not affect the result."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts about the compression that the technique records next to the model, as plain JSON."""
    report: Report = no_report
