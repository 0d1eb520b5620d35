"""The Pareto front: which of several measured points are worth keeping. Numbers only, no models, no I/O."""

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
    """The objectives' values, each with the sign that makes smaller better.

    Raises LookupError for an objective without a value, ValueError for a NaN or infinite one.
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
    ours, theirs = losses(a, objectives), losses(b, objectives)
    return ours != theirs and all(one <= other for one, other in zip(ours, theirs, strict=True))


def nondominated(
    rows: Float[NDArray[np.float64], "points objectives"], objectives: Sequence[Objective]
) -> Bool[NDArray[np.bool_], " points"]:
    """Which rows no other row dominates. Rows hold values in their natural sign; limits are not looked at."""
    signs = np.array([objective.loss(1.0) for objective in objectives])
    points = np.asarray(rows, dtype=np.float64).reshape(-1, len(objectives)) * signs
    kept = np.ones(len(points), dtype=np.bool_)
    columns = np.ascontiguousarray(points.T)
    # A row comes after those that dominate it, and whatever it dominates they dominate too: only those that
    # stay need a look.
    for row in np.lexsort(columns[::-1]).tolist():
        if kept[row]:
            worse = np.logical_and.reduce([column >= column[row] for column in columns])
            better = np.logical_or.reduce([column > column[row] for column in columns])
            kept &= ~(worse & better)
    return kept


def hypervolume(
    losses: Float[NDArray[np.float64], "points objectives"],
    reference: Float[NDArray[np.float64], " objectives"],
) -> float:
    """The volume that the points dominate and the reference bounds; smaller losses are better. Exact.

    Points that are not better than the reference in every objective add nothing. Made for fronts of up
    to some hundred points in at most four objectives: the cost is points^(objectives - 1).
    """
    bound = np.asarray(reference, dtype=np.float64)
    points = np.asarray(losses, dtype=np.float64).reshape(-1, len(bound))
    inside = np.unique(points[(points < bound).all(axis=1)], axis=0)
    if len(bound) <= 2:
        return _swept(inside, bound)  # what is dominated adds nothing there, and costs next to nothing
    signs = [Objective(str(column)) for column in range(len(bound))]
    return _swept(inside[nondominated(inside, signs)], bound)


def _swept(points: NDArray[np.float64], bound: NDArray[np.float64]) -> float:
    """Slice along the last objective: between two neighbours the cross-section stays the same."""
    if not len(points):
        return 0.0
    points = points[np.argsort(points[:, -1], kind="stable")]
    thickness = np.diff(np.append(points[:, -1], bound[-1]))
    if points.shape[1] == 1:
        return float(thickness.sum())
    if points.shape[1] == 2:
        return float(thickness @ (bound[0] - np.minimum.accumulate(points[:, 0])))
    return sum(
        float(thick) * _swept(points[: count + 1, :-1], bound[:-1])
        for count, thick in enumerate(thickness)
        if thick > 0
    )


@dataclass
class ParetoFront:
    """The points that no other dominates, among those added that keep every limit.

    Points with equal values both stay: neither is better, and the user may care which recipe it is.
    """

    objectives: Sequence[Objective]
    members: dict[str, Metrics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metrics in self.members.values():
            losses(metrics, self.objectives)
        kept = {
            id: dict(metrics)
            for id, metrics in self.members.items()
            if not any(objective.broken_by(metrics[objective.metric]) for objective in self.objectives)
        }
        rows = np.array([[m[o.metric] for o in self.objectives] for m in kept.values()])
        best = nondominated(rows, self.objectives)
        self.members = {id: metrics for (id, metrics), good in zip(kept.items(), best, strict=True) if good}

    def add(self, id: str, metrics: Metrics) -> bool:
        """Offer a point; whether it is on the front now. Members that it dominates leave.

        An id that is added again is taken by its new values. Raises LookupError where an objective has
        no value and ValueError where one is NaN or infinite; the front is then as it was.
        """
        new = np.array(losses(metrics, self.objectives))
        self.members.pop(id, None)
        if any(objective.broken_by(metrics[objective.metric]) for objective in self.objectives):
            return False
        members = self._losses()
        if np.any((members <= new).all(axis=1) & (members < new).any(axis=1)):
            return False
        worse = np.flatnonzero((members >= new).all(axis=1) & (members > new).any(axis=1)).tolist()
        ids = list(self.members)
        for place in worse:
            del self.members[ids[place]]
        self.members[id] = dict(metrics)
        return True

    def hypervolume(self, reference: Metrics) -> float:
        """The volume between the front and the reference, which is given in natural signs."""
        return hypervolume(self._losses(), np.array(losses(reference, self.objectives)))

    def knee(self) -> str:
        """The member nearest to the ideal, each objective scaled to its range on the front."""
        self._refuse_if_empty()
        return list(self.members)[int(np.argmin(self._distances()))]

    def pick(self, name: Pick) -> str:
        """The id of the member of that name; of several equally good ones, that nearest to the knee.

        Raises LookupError for an empty front, and where no objective says what the name asks for.
        """
        if name == "knee":
            return self.knee()
        self._refuse_if_empty()
        column = self.objectives.index(self._objective_of(name))
        order = np.lexsort((self._distances(), self._losses()[:, column]))
        return list(self.members)[int(order[0])]

    def _objective_of(self, name: Pick) -> Objective:
        wanted = {
            "smallest": [o for o in self.objectives if o.metric == "size_bytes"],
            "fastest": sorted(
                (o for o in self.objectives if o.metric.endswith("_ms")),
                key=lambda o: o.metric != "decode_ms",
            ),
            "most-accurate": [o for o in self.objectives if not o.metric.endswith(("_bytes", "_ms", "_gib"))],
        }
        if name not in wanted:
            raise LookupError(f"a front has no member called {name!r} (there are: {', '.join(PICKS)})")
        if not wanted[name]:
            known = ", ".join(objective.metric for objective in self.objectives)
            raise LookupError(f"no objective among {known} says which member is {name}")
        return wanted[name][0]

    def _losses(self) -> NDArray[np.float64]:
        rows = [[o.loss(m[o.metric]) for o in self.objectives] for m in self.members.values()]
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.objectives))

    def _distances(self) -> NDArray[np.float64]:
        points = self._losses()
        ideal, span = points.min(axis=0), np.ptp(points, axis=0)
        scaled = (points - ideal) / np.where(span > 0, span, 1.0)
        return np.asarray(np.linalg.norm(scaled, axis=1))

    def _refuse_if_empty(self) -> None:
        if not self.members:
            raise LookupError("the front is empty: no candidate was measured within the limits")
