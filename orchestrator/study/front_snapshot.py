"""The front of a study as stored data: the content of `front.json`. Imports no library, so that it opens fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.pareto.objective import Objective

_RENAMED_STANDINGS = {"elsewhere": "other_environment", "outrun": "eliminated"}
"""Standings as files of earlier versions spell them, with the names of today."""


@dataclass(frozen=True)
class Difference:
    """The difference of two models in one metric, with its standard error."""

    value: float
    error: float
    items: int
    """The number of evaluation items that both were measured on."""


@dataclass(frozen=True)
class MeasuredModel:
    """The metrics of one model and the environment in which they were measured."""

    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard errors by metric, where there are any."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metrics": dict(self.metrics),
            "errors": dict(self.errors),
            "environment": dict(self.environment),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> MeasuredModel:
        return MeasuredModel(content["metrics"], content.get("errors", {}), content.get("environment", {}))


@dataclass(frozen=True)
class FrontMember:
    """A candidate on the front."""

    id: str
    recipe: str
    """The recipe as text, such as `drop_layers(count=1) → rtn(bits=4)`."""
    measured: MeasuredModel
    differences: Mapping[str, Difference]
    """The paired differences from the original by metric, for metrics that have one value for each item."""
    artifact: str | None
    """The digest of the model in the store."""

    def to_dict(self) -> dict[str, Any]:
        differences = {metric: asdict(difference) for metric, difference in self.differences.items()}
        return {
            "id": self.id,
            "recipe": self.recipe,
            **self.measured.to_dict(),
            "differences": differences,
            "artifact": self.artifact,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> FrontMember:
        differences = {
            metric: Difference(**difference) for metric, difference in content.get("differences", {}).items()
        }
        measured = MeasuredModel.from_dict(content)
        return FrontMember(content["id"], content["recipe"], measured, differences, content["artifact"])


@dataclass(frozen=True)
class FrontSnapshot:
    """The front of a study at one moment. `orchestrator.study.results.front_snapshot` builds it."""

    study: str
    objectives: tuple[Objective, ...]
    original: MeasuredModel
    members: tuple[FrontMember, ...]
    """Sorted by size."""
    picks: Mapping[str, str]
    """The ids of the members that have a name, such as knee, by that name."""
    reference: Mapping[str, float] | None
    """The reference point of the hypervolume; None until the original is measured in every objective."""
    hypervolume: float | None
    candidates: Mapping[str, int]
    """The number of candidates by standing."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `front.json`."""
        return {
            "study": self.study,
            "objectives": [asdict(objective) for objective in self.objectives],
            "original": self.original.to_dict(),
            "members": [member.to_dict() for member in self.members],
            "picks": dict(self.picks),
            "reference": None if self.reference is None else dict(self.reference),
            "hypervolume": self.hypervolume,
            "candidates": dict(self.candidates),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> FrontSnapshot:
        """Read the content of a `front.json` of this version or an earlier one."""
        return FrontSnapshot(
            study=content["study"],
            objectives=tuple(Objective(**objective) for objective in content["objectives"]),
            original=MeasuredModel.from_dict(content["original"]),
            members=tuple(FrontMember.from_dict(member) for member in content["members"]),
            picks=content["picks"],
            reference=content["reference"],
            hypervolume=content["hypervolume"],
            candidates={
                _RENAMED_STANDINGS.get(standing, standing): count
                for standing, count in content["candidates"].items()
            },
        )
