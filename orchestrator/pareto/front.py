"""The Pareto front: the points that no other point dominates. Numbers only, without models or I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from orchestrator.pareto.objective import Objective as Objective  # most importers of a front need it too

Metrics = Mapping[str, float]
Pick = Literal["knee", "smallest", "fastest", "most-accurate"]
PICKS: tuple[Pick, ...] = ("knee", "smallest", "fastest", "most-accurate")


def losses(metrics: Metrics, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return the values of the objectives, each with the sign that makes smaller better.

    LookupError for an objective without a value, ValueError for a NaN or infinite one.
    """
    for objective in objectives:
        value = metrics.get(objective.metric)
        if value is None:
            raise LookupError(
                f"the objective {objective.metric} has no value among {', '.join(metrics) or 'no metrics'}"
            )
        if not math.isfinite(value):
            raise ValueError(f"{objective.metric}={value} is not a number to compare; record it as a failure")
    return tuple(objective.loss(metrics[objective.metric]) for objective in objectives)


def dominates(a: Metrics, b: Metrics, objectives: Sequence[Objective]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better. Equal points do not dominate each other."""
    a_losses, b_losses = losses(a, objectives), losses(b, objectives)
    pairs = zip(a_losses, b_losses, strict=True)
    return a_losses != b_losses and all(a_loss <= b_loss for a_loss, b_loss in pairs)


def nondominated(
    rows: Float[NDArray[np.float64], "points objectives"], objectives: Sequence[Objective]
) -> Bool[NDArray[np.bool_], " points"]:
    """Return whether each row is not dominated by any other row.

    Rows hold values in their natural sign; limits are ignored.
    """
    signs = np.array([objective.loss(1.0) for objective in objectives])
    points = np.asarray(rows, dtype=np.float64).reshape(-1, len(objectives)) * signs
    is_nondominated = np.ones(len(points), dtype=np.bool_)
    columns = np.ascontiguousarray(points.T)
    # In lexicographic order a row comes after all rows that dominate it. Dominated rows are skipped: the rows that
    # dominate them also dominate everything that they dominate.
    for row in np.lexsort(columns[::-1]).tolist():
        if is_nondominated[row]:
            not_better = np.logical_and.reduce([column >= column[row] for column in columns])
            worse = np.logical_or.reduce([column > column[row] for column in columns])
            is_nondominated &= ~(not_better & worse)
    return is_nondominated


def hypervolume(
    losses: Float[NDArray[np.float64], "points objectives"],
    reference: Float[NDArray[np.float64], " objectives"],
) -> float:
    """Return the exact volume between the points and the reference; smaller losses are better.

    Points that are not better than the reference in every objective are ignored. The run time is proportional to
    points^(objectives - 1), which suits some hundred points in at most four objectives.
    """
    bound = np.asarray(reference, dtype=np.float64)
    points = np.asarray(losses, dtype=np.float64).reshape(-1, len(bound))
    inside = np.unique(points[(points < bound).all(axis=1)], axis=0)
    if len(bound) <= 2:
        return _volume(inside, bound)  # dominated points add nothing, and skipping them would save no time
    objectives = [Objective(str(column)) for column in range(len(bound))]
    return _volume(inside[nondominated(inside, objectives)], bound)


def _volume(points: NDArray[np.float64], bound: NDArray[np.float64]) -> float:
    """Add up slices along the last objective; the cross-section is the same between two neighbouring points."""
    if not len(points):
        return 0.0
    points = points[np.argsort(points[:, -1], kind="stable")]
    thickness = np.diff(np.append(points[:, -1], bound[-1]))
    if points.shape[1] == 1:
        return float(thickness.sum())
    if points.shape[1] == 2:
        return float(thickness @ (bound[0] - np.minimum.accumulate(points[:, 0])))
    return sum(
        float(thick) * _volume(points[: count + 1, :-1], bound[:-1])
        for count, thick in enumerate(thickness)
        if thick > 0
    )


@dataclass
class ParetoFront:
    """The points that keep every limit and that no other one dominates, by id.

    Points with equal values both stay, since they are different recipes that a user may choose from.
    """

    objectives: Sequence[Objective]
    members: dict[str, Metrics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        within: dict[str, Metrics] = {}
        for id, metrics in self.members.items():
            losses(metrics, self.objectives)
            if not self._breaks_limit(metrics):
                within[id] = dict(metrics)
        is_member = nondominated(self._rows(within), [Objective(o.metric) for o in self.objectives])
        self.members = {
            id: metrics for (id, metrics), member in zip(within.items(), is_member, strict=True) if member
        }

    def add(self, id: str, metrics: Metrics) -> bool:
        """Add a point, and remove the members that it dominates; return whether it is on the front.

        A point with the id of a member replaces it. LookupError for an objective without a value and ValueError for a
        NaN or infinite one, without a change of the front.
        """
        new = np.array(losses(metrics, self.objectives))
        self.members.pop(id, None)
        if self._breaks_limit(metrics):
            return False
        members = self._losses()
        if np.any((members <= new).all(axis=1) & (members < new).any(axis=1)):
            return False
        dominated = np.flatnonzero((members >= new).all(axis=1) & (members > new).any(axis=1)).tolist()
        ids = list(self.members)
        for row in dominated:
            del self.members[ids[row]]
        self.members[id] = dict(metrics)
        return True

    def hypervolume(self, reference: Metrics) -> float:
        """Return the volume between the front and the reference, which has natural signs."""
        return hypervolume(self._losses(), np.array(losses(reference, self.objectives)))

    def knee(self) -> str:
        """Return the id of the member nearest to the ideal point, each objective scaled to its range on the front."""
        self._refuse_if_empty()
        return list(self.members)[int(np.argmin(self._distances()))]

    def pick(self, name: Pick) -> str:
        """Return the id of the member with this name; of several equally good ones, the nearest to the ideal point.

        LookupError for an empty front, and if no objective defines the name.
        """
        if name == "knee":
            return self.knee()
        self._refuse_if_empty()
        column = self.objectives.index(self._objective_of(name))
        order = np.lexsort((self._distances(), self._losses()[:, column]))
        return list(self.members)[int(order[0])]

    def _objective_of(self, name: Pick) -> Objective:
        times = [objective for objective in self.objectives if objective.metric.endswith("_ms")]
        costs = ("_bytes", "_ms", "_gib")
        matching = {
            "smallest": [objective for objective in self.objectives if objective.metric == "size_bytes"],
            "fastest": sorted(times, key=lambda objective: objective.metric != "decode_ms"),
            "most-accurate": [
                objective for objective in self.objectives if not objective.metric.endswith(costs)
            ],
        }
        if name not in matching:
            raise LookupError(f"a front has no member called {name!r} (there are: {', '.join(PICKS)})")
        if not matching[name]:
            metrics = ", ".join(objective.metric for objective in self.objectives)
            raise LookupError(f"no objective among {metrics} says which member is {name}")
        return matching[name][0]

    def _breaks_limit(self, metrics: Metrics) -> bool:
        return any(objective.broken_by(metrics[objective.metric]) for objective in self.objectives)

    def _losses(self) -> NDArray[np.float64]:
        return self._rows(self.members)

    def _rows(self, members: Mapping[str, Metrics]) -> NDArray[np.float64]:
        """The losses of these points, one row each."""
        rows = []
        for metrics in members.values():
            rows.append([objective.loss(metrics[objective.metric]) for objective in self.objectives])
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.objectives))

    def _distances(self) -> NDArray[np.float64]:
        """The scaled distance of each member from the ideal point."""
        points = self._losses()
        ideal, span = points.min(axis=0), np.ptp(points, axis=0)
        scaled = (points - ideal) / np.where(span > 0, span, 1.0)
        return np.asarray(np.linalg.norm(scaled, axis=1))

    def _refuse_if_empty(self) -> None:
        if not self.members:
            raise LookupError("the front is empty: no candidate was measured within the limits")
