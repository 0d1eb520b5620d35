"""Context: what a technique may use besides the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from jobs.parallel import Sharing
from jobs.progress import Report

if TYPE_CHECKING:
    from jobs.calibration.statistics import Statistics
    from jobs.models.model import Model


@dataclass(frozen=True)
class Context:
    """Everything a technique may read. What its `needs` do not name may be missing.

    calibration, training: token ids, one sequence of equal length per row.
    teacher: loads the original model anew at each call, whole on its device; the caller owns it.
    teacher_statistics: what depends on the original and the training text alone, shared by all students.
    checkpoints: a folder for a training's checkpoints that outlives the attempt, and is this recipe's own.
    sharing: how a training is spread over ranks; it decides nothing of what comes of it.
    notes: what the technique wants told beside the model of how it was made; plain JSON, written by it.
    """

    statistics: Statistics
    workdir: Path
    seed: int
    calibration: Int[Tensor, "samples tokens"] | None = None
    training: Int[Tensor, "samples tokens"] | None = None
    teacher: Callable[[], Model] | None = None
    teacher_statistics: Statistics | None = None
    checkpoints: Path | None = None
    sharing: Sharing = field(default_factory=Sharing)
    notes: dict[str, Any] = field(default_factory=dict)
    report: Report = lambda share, what: None
