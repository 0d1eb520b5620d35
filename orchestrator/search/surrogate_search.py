"""Surrogate search: learns what choices do to what must be measured, and tries what should add most to the front."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from jobs.knobs import Value
from orchestrator.pareto.expected_improvement import Expected, chance_to_add, expected_improvement
from orchestrator.pareto.front import Metrics, Objective, nondominated
from orchestrator.search.candidate_pool import CandidateEvaluator, Losses, Pool
from orchestrator.search.encoding import Points, SpaceEncoder
from orchestrator.search.features import Rows
from orchestrator.search.gaussian_process import GaussianProcess, ObjectiveModel
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import Choices, Known, Result, Space

_START = 6
"""So many choices are asked, as different as can be, before anything is believed."""
_JUDGED_BY = 12
"""With fewer results nothing is said of the chances of what is under way."""
_ANYWHERE, _NEAR = 100, 80
"""New choices that a proposal is picked from: drawn anywhere (and half as many levelled), and near the front, near
the best of the last proposal, near what is believed to be the front."""
_BEST = 20
_KEPT = 150
_BELIEVED = 600
"""So many results are learned from, about."""
_MAX_FRONT_POINTS = {1: 1, 2: 400, 3: 60, 4: 16}
"""So many points of a front count at most, by the number of objectives: boxes grow with their power."""
_NO_IMPROVEMENT = 1e-9
_REFERENCE_QUANTILES = (None, 0.5, None, 0.9)
_UNIFORM_SHARE = 0.8
"""Shares of the space within the bounds of a volume, by what is believed and by what is known of it. None: bounds by
the front."""
_EXPLORATION_FACTORS = (1.0, 3.0)
"""What deviations are taken times, one after the other, until something is expected to add to the front."""

Point = Float[NDArray[np.float64], " knobs"]
Scores = Float[NDArray[np.float64], " points"]


class SurrogateSearch:
    """Objectives that are known beforehand are taken as they are; each other one has a belief of its own. A proposal
    is what has the highest expected hypervolume improvement in a pool of choices: new ones each time, the best of the
    last times kept. What was asked and is not told yet counts as if it had come out as believed, which keeps a batch
    apart. Choices that fail are believed about too, and tried less where failures are likely. Where it is known what
    trying a choice would take, what it should add is weighed by that.
    """

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        self._objectives = tuple(objectives)
        self._proposals = Proposals(objectives, known)
        self._generator = np.random.default_rng(seed)
        self._places = SpaceEncoder(space)
        self._survey = CandidateEvaluator(self._places, objectives, known, self._generator)
        self._told: dict[bytes, tuple[Point, Metrics | None]] = {}
        self._asked: dict[bytes, Point] = {}
        self._given_up: set[bytes] = set()
        self._pool = self._survey.enter(self._places.none())
        self._likely = self._places.none()
        self._forget()

    def ask(self, n: int) -> list[dict[str, Value]]:
        found: list[dict[str, Value]] = []
        while len(found) < n:
            choices = self._next()
            if choices is None:
                break
            self._proposals.take(choices)
            point = self._places.point(choices)
            self._asked[_mark(point)] = point
            found.append(choices)
        return found

    def tell(self, results: Sequence[Result]) -> None:
        for point in self._points([choices for choices, outcome in results if outcome is None]):
            self._asked.pop(_mark(point), None)
            self._given_up.add(_mark(point))
        acting = [(self._places.acting(choices), outcome) for choices, outcome in results]
        for choices, metrics in self._proposals.news(acting):
            for point in self._points([choices]):
                self._asked.pop(_mark(point), None)
                self._told[_mark(point)] = point, metrics
                self._stale = True

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        points, losses = self._measured()
        asked = self._points(awaited)
        if len(losses) < _JUDGED_BY or len(asked) < len(awaited):
            return [1.0] * len(awaited)
        pool = self._discovered(self._survey.enter(np.array(asked)))
        self._learn(points, losses)
        foretold = [
            Expected(pool.known[:, column], np.zeros(len(pool)))
            if known
            else self._beliefs[column].outcome(pool.rows)
            for column, known in enumerate(self._survey.foreknown)
        ]
        limits = [np.inf if o.limit is None else o.loss(o.limit) for o in self._objectives]
        seen = [
            one.scale.seen(np.append(column, limit))
            for one, column, limit in zip(foretold, losses[self._best(losses)].T, limits, strict=True)
        ]
        found = chance_to_add(np.column_stack(seen)[:-1], np.array(seen)[:, -1], foretold)
        made = np.isfinite(pool.known[:, self._survey.foreknown]).all(axis=1)
        return [float(one) for one in np.where(made, found, 1.0)]

    def _points(self, choices: Sequence[Choices]) -> list[Point]:
        """Where these are, without those that are not in the space: it may be narrower than when they were chosen."""
        found = []
        for one in choices:
            with suppress(ValueError, LookupError):
                found.append(self._places.point(one))
        return found

    def _forget(self) -> None:
        """Begin with no beliefs."""
        self._beliefs: dict[int, ObjectiveModel] = {}
        self._failing: GaussianProcess | None = None
        self._stale = True

    def _next(self) -> dict[str, Value] | None:
        pool = self._candidates()
        if not len(pool):
            # Nothing at hand: any choice that is new and keeps the limits, however long that takes to find.
            drawn = self._proposals.draw(
                1, lambda: self._places.choices(self._places.uniform(1, self._generator)[0])
            )
            return drawn[0] if drawn else None
        points, losses = self._measured()
        if not len(points) or len(self._told) + len(self._asked) < _START:
            order = np.argsort(-self._novelty(pool) / pool.seconds, kind="stable")
        else:
            self._learn(points, losses)
            awaited = self._survey.rows(np.array(list(self._asked.values()))) if self._asked else None
            foretold = self._foretold(pool, awaited)
            order = np.argsort(-self._scores(pool, foretold, losses), kind="stable")
            self._likely = pool.points[self._best(np.column_stack([one.median for one in foretold]))]
        self._pool = pool.take(order[1 : _KEPT + 1])
        return self._places.choices(pool.points[order[0]])

    def _candidates(self) -> Pool:
        """What was kept and what is new, but for what was asked or told; within the limits that are known."""
        # Entered anew, for what trying them would take changes as the study makes what they share.
        kept = self._survey.enter(self._open(self._pool.points))
        drawn = [
            self._places.uniform(_ANYWHERE, self._generator),
            self._places.levelled(_ANYWHERE // 2, self._generator),
        ]
        points, losses = self._measured()
        for parents in (points[self._best(losses)], kept.points[:_BEST], self._likely):
            if len(parents):
                drawn.append(self._places.neighbours(parents, _NEAR, self._generator))
        pool = kept.joined(self._survey.enter(self._open(np.concatenate(drawn), _marks(kept.points))))
        return self._survey.within(self._discovered(pool))

    def _discovered(self, pool: Pool) -> Pool:
        """The same choices, entered anew where an objective turns out to be known that was not."""
        if not self._survey.discovers(pool):
            return pool
        self._forget()
        return self._survey.enter(pool.points)

    def _open(self, points: Points, held: Sequence[bytes] = ()) -> Points:
        """Of these, each once, what was neither asked, told nor given up, and is not held."""
        gone = {*held, *self._told, *self._asked, *self._given_up}
        rows = {mark: row for row, mark in enumerate(_marks(points)) if mark not in gone}
        return points[list(rows.values())]

    def _measured(self) -> tuple[Points, Losses]:
        """What was told and is no failure."""
        complete = [(point, metrics) for point, metrics in self._told.values() if metrics is not None]
        points = np.array([point for point, _ in complete]).reshape(-1, len(self._places.axes))
        losses = [[o.loss(metrics[o.metric]) for o in self._objectives] for _, metrics in complete]
        return points, np.array(losses, dtype=np.float64).reshape(-1, len(self._objectives))

    def _best(self, losses: Losses) -> NDArray[np.bool_]:
        return nondominated(losses, [Objective(o.metric) for o in self._objectives])

    def _learn(self, points: Points, losses: Losses) -> None:
        """Take in what was told since."""
        if not self._stale:
            return
        some = np.arange(len(losses))[-_BELIEVED:]
        if len(losses) > _BELIEVED:
            some = np.union1d(np.flatnonzero(self._best(losses)), some)
        rows = self._survey.rows(points[some])
        for column in np.flatnonzero(~self._survey.foreknown):
            belief = self._beliefs.setdefault(int(column), ObjectiveModel(self._survey.features))
            belief.fit(rows, losses[some, column], self._survey.everywhere.rows)
        latest = list(self._told.values())[-_BELIEVED:]
        failed = np.array([metrics is None for _, metrics in latest], dtype=np.float64)
        if failed.any():
            self._failing = self._failing or GaussianProcess(self._survey.features)
            self._failing.fit(self._survey.rows(np.array([point for point, _ in latest])), failed)
        self._stale = False

    def _foretold(self, pool: Pool, awaited: Rows | None = None) -> list[Expected]:
        """Of each objective, what is known or believed."""
        return [
            Expected(pool.known[:, column], np.zeros(len(pool)))
            if known
            else self._beliefs[column].predict(pool.rows, awaited)
            for column, known in enumerate(self._survey.foreknown)
        ]

    def _scores(self, pool: Pool, foretold: Sequence[Expected], losses: Losses) -> Scores:
        """What each choice is expected to add to the front; how new each is where nothing adds to it."""
        if self._asked:
            asked = self._survey.enter(np.array(list(self._asked.values())))
            believed = [one.median for one in self._foretold(asked)]
            losses = np.concatenate([losses, np.column_stack(believed)])
        # The volume is of what beliefs see: where that is a logarithm, halving counts the same everywhere.
        losses = np.column_stack(
            [one.scale.seen(column) for one, column in zip(foretold, losses.T, strict=True)]
        )
        front, reference = self._bounded(losses, foretold)
        for boldness in _EXPLORATION_FACTORS:
            gain = expected_improvement(front, reference, foretold, boldness)
            if gain.max() > _NO_IMPROVEMENT * float(
                np.prod(np.maximum(np.ptp(losses, axis=0), _NO_IMPROVEMENT))
            ):
                return np.asarray(gain * self._works(pool) / pool.seconds)
        return self._novelty(pool)

    def _bounded(self, losses: Losses, foretold: Sequence[Expected]) -> tuple[Losses, Point]:
        """The front, and the point that bounds its volume: where the limits are. Without a limit, in turns, a little
        beyond the front, which fills it, and where much of the whole space is, which widens it. Bounds that only went
        by results would keep the search where it is."""
        front = losses[self._best(losses)]
        ideal, worst = front.min(axis=0), front.max(axis=0)
        share = _REFERENCE_QUANTILES[len(losses) % len(_REFERENCE_QUANTILES)]
        if share is None:
            reference = worst + 0.1 * np.maximum(worst - ideal, 1e-3 * np.ptp(losses, axis=0))
        else:
            usual = self._usual()
            shares = np.where(self._survey.foreknown, _UNIFORM_SHARE, share)
            reference = np.nanquantile(usual, shares, axis=0).diagonal()
            reference = np.maximum(reference, ideal + 0.1 * np.ptp(losses, axis=0))
        for column, (objective, one) in enumerate(zip(self._objectives, foretold, strict=True)):
            if objective.limit is not None:
                reference[column] = one.scale.seen(np.array([objective.loss(objective.limit)]))[0]
        extent = np.where(reference > ideal, reference - ideal, 1.0)
        nearest = np.argsort((front / extent).sum(axis=1), kind="stable")
        return front[nearest[: _MAX_FRONT_POINTS.get(losses.shape[1], 8)]], reference

    def _usual(self) -> Losses:
        """What is known of choices of the whole space, or is believed of them as its scale sees it."""
        everywhere = self._survey.everywhere
        return np.column_stack(
            [
                everywhere.known[:, column] if known else self._beliefs[column].mean(everywhere.rows)
                for column, known in enumerate(self._survey.foreknown)
            ]
        )

    def _novelty(self, pool: Pool) -> Scores:
        """How much of each choice is not told by those that were asked and told, whatever came of these."""
        had = [point for point, _ in self._told.values()] + list(self._asked.values())
        if not had:
            return np.zeros(len(pool))
        part = self._survey.features.effects
        rows, others = pool.rows[:, part], self._survey.rows(np.array(had[-_BELIEVED:]))[:, part]
        covariance = others @ others.T + 0.1 * np.eye(len(others))
        across = rows @ others.T
        return np.asarray(
            (rows**2).sum(axis=1) - (across * np.linalg.solve(covariance, across.T).T).sum(axis=1)
        )

    def _works(self, pool: Pool) -> Scores:
        """How likely each is not to fail, once some have."""
        if self._failing is None:
            return np.ones(len(pool))
        return self._failing.below(pool.rows, 0.5)


def _mark(point: Point) -> bytes:
    """Equal for points that differ by rounding alone."""
    return _marks(point[None])[0]


def _marks(points: Points) -> list[bytes]:
    return [row.tobytes() for row in np.round(points, 9) + 0.0]
