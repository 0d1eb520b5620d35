"""Surrogate search: predicts objectives from results, and proposes the largest expected hypervolume improvement."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from jobs.knobs import Value
from orchestrator.pareto.expected_improvement import (
    Prediction,
    expected_improvement,
    probability_of_improvement,
)
from orchestrator.pareto.front import Metrics, Objective, nondominated
from orchestrator.search.candidate_pool import CandidateEvaluator, Losses, Pool
from orchestrator.search.encoding import Points, SpaceEncoder
from orchestrator.search.features import Rows
from orchestrator.search.gaussian_process import GaussianProcess, ObjectiveModel
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import Choices, KnownMetrics, Result, Space

INITIAL_PROPOSALS = 6
"""Number of proposals, as different from each other as possible, before the first model is fitted. With eight seeds, 6
and 10 gave the same fronts (benchmarks/LOG.md)."""
MIN_RESULTS_FOR_PROBABILITIES = 12
"""With fewer results, the leave-one-out errors of the models are too uncertain to stop candidates by."""
UNIFORM_POINTS, LEVELLED_POINTS, NEIGHBOURS = 100, 50, 80
"""Number of new points in the pool of each proposal: uniform ones, levelled ones, and neighbours of each of the front,
the best points of the last pool, and the predicted front. A few hundred evaluations of known metrics take less than a
second; chosen by hand."""
POOL_PARENTS = 20
"""Number of points of the last pool that neighbours are drawn from."""
REUSED_POINTS = 150
"""Number of points that a pool inherits from the last one, so that the optimization of the score continues."""
MAX_MODEL_RESULTS = 600
"""Models learn from the newest results up to this number and from the front: the time of a fit grows with the cube of
the number of results."""
MAX_FRONT_POINTS = {1: 1, 2: 400, 3: 60, 4: 16}
"""Maximum number of front points in the score, by the number of objectives: the number of boxes grows with the number
of points to the power of the objectives minus one. With these numbers there are at most a few thousand boxes."""
MAX_FRONT_POINTS_OTHERWISE = 8
MIN_RELATIVE_IMPROVEMENT = 1e-9
"""An expected improvement below this share of the volume of all results counts as none: rounding errors are near it."""
REFERENCE_QUANTILES = (None, 0.5, None, 0.9)
"""The reference points of the hypervolume, in turns: just beyond the front (None) to fill it, and quantiles of the
predictions over the whole space to widen it. Other references made the search stay near its first results on
NASBench201 (benchmarks/LOG.md)."""
DETERMINISTIC_QUANTILE = 0.8
"""The quantile that replaces those of `REFERENCE_QUANTILES` for deterministic objectives."""
EXPLORATION_FACTORS = (1.0, 3.0)
"""Factors of the predicted standard deviations: the second one is used if no point in the pool is expected to improve
the front with the first one."""
NOVELTY_NOISE = 0.1
"""Noise variance of the linear model whose remaining variance is the novelty of a point; chosen by hand."""

Point = Float[NDArray[np.float64], " knobs"]
Scores = Float[NDArray[np.float64], " points"]


class SurrogateSearch:
    """Proposes the choices with the largest expected hypervolume improvement per second in a pool of random choices.

    Deterministic objectives are known exactly; each other one has an `ObjectiveModel`. Pending choices are assumed to
    have their predicted medians as results, so that the choices of a batch differ. The probability of failure is
    predicted as well and reduces the score.
    """

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        self._objectives = tuple(objectives)
        self._proposals = Proposals(objectives, known_metrics)
        self._generator = np.random.default_rng(seed)
        self._encoder = SpaceEncoder(space)
        self._evaluator = CandidateEvaluator(self._encoder, objectives, known_metrics, self._generator)
        self._results: dict[bytes, tuple[Point, Metrics | None]] = {}
        """The result of each point; None for a failure."""
        self._pending: dict[bytes, Point] = {}
        self._stopped: set[bytes] = set()
        self._pool = self._evaluator.evaluate(self._encoder.none())
        self._predicted_front = self._encoder.none()
        self._reset_models()

    def ask(self, n: int) -> list[dict[str, Value]]:
        proposals: list[dict[str, Value]] = []
        while len(proposals) < n:
            choices = self._propose()
            if choices is None:
                break
            self._proposals.add(choices)
            point = self._encoder.point(choices)
            self._pending[_key(point)] = point
            proposals.append(choices)
        return proposals

    def tell(self, results: Sequence[Result]) -> None:
        stopped = [choices for choices, outcome in results if outcome is None]
        for point in self._points_of(stopped):
            self._pending.pop(_key(point), None)
            self._stopped.add(_key(point))
        canonical = [(self._encoder.canonical(choices), outcome) for choices, outcome in results]
        for choices, metrics in self._proposals.new_results(canonical):
            for point in self._points_of([choices]):
                self._pending.pop(_key(point), None)
                self._results[_key(point)] = point, metrics
                self._models_outdated = True

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        points, losses = self._measured()
        pending_points = self._points_of(pending)
        if len(losses) < MIN_RESULTS_FOR_PROBABILITIES or len(pending_points) < len(pending):
            return [1.0] * len(pending)
        pool = self._current(self._evaluator.evaluate(np.array(pending_points)))
        self._fit_models(points, losses)
        predictions = []
        for column, deterministic in enumerate(self._evaluator.deterministic_objectives):
            if deterministic:
                predictions.append(Prediction(pool.losses[:, column], np.zeros(len(pool))))
            else:
                predictions.append(self._models[column].predict_result(pool.rows))
        front = losses[self._nondominated(losses)]
        warped_front, warped_limits = np.empty_like(front), np.empty(len(predictions))
        for column, (objective, prediction) in enumerate(zip(self._objectives, predictions, strict=True)):
            limit = np.inf if objective.limit is None else objective.loss(objective.limit)
            warped = prediction.warping.warp(np.append(front[:, column], limit))
            warped_front[:, column], warped_limits[column] = warped[:-1], warped[-1]
        probabilities = probability_of_improvement(warped_front, warped_limits, predictions)
        deterministic_losses = pool.losses[:, self._evaluator.deterministic_objectives]
        can_be_built = np.isfinite(deterministic_losses).all(axis=1)
        return [float(probability) for probability in np.where(can_be_built, probabilities, 1.0)]

    def _points_of(self, choices: Sequence[Choices]) -> list[Point]:
        """The points of these choices, without those outside the space, which may be smaller in a resumed study."""
        points = []
        for choice in choices:
            with suppress(ValueError, LookupError):
                points.append(self._encoder.point(choice))
        return points

    def _reset_models(self) -> None:
        self._models: dict[int, ObjectiveModel] = {}
        self._failure_model: GaussianProcess | None = None
        self._models_outdated = True

    def _propose(self) -> dict[str, Value] | None:
        pool = self._next_pool()
        if not len(pool):
            # Draw single points until one is new and within the limits.
            drawn = self._proposals.draw(
                1, lambda: self._encoder.choices(self._encoder.uniform(1, self._generator)[0])
            )
            return drawn[0] if drawn else None
        points, losses = self._measured()
        if not len(points) or len(self._results) + len(self._pending) < INITIAL_PROPOSALS:
            order = np.argsort(-self._novelty(pool) / pool.seconds, kind="stable")
        else:
            self._fit_models(points, losses)
            predictions = self._predict(pool, self._pending_rows())
            order = np.argsort(-self._scores(pool, predictions, losses), kind="stable")
            medians = np.column_stack([prediction.median for prediction in predictions])
            self._predicted_front = pool.points[self._nondominated(medians)]
        self._pool = pool.take(order[1 : REUSED_POINTS + 1])
        return self._encoder.choices(pool.points[order[0]])

    def _next_pool(self) -> Pool:
        """The best points of the last pool and new ones that are feasible and were not proposed."""
        # Evaluated again, since expected durations decrease as the study builds models that candidates share.
        reused = self._evaluator.evaluate(self._new(self._pool.points))
        drawn = [
            self._encoder.uniform(UNIFORM_POINTS, self._generator),
            self._encoder.levelled(LEVELLED_POINTS, self._generator),
        ]
        points, losses = self._measured()
        front = points[self._nondominated(losses)]
        for parents in (front, reused.points[:POOL_PARENTS], self._predicted_front):
            if len(parents):
                drawn.append(self._encoder.neighbours(parents, NEIGHBOURS, self._generator))
        new = self._evaluator.evaluate(self._new(np.concatenate(drawn), _keys(reused.points)))
        return self._evaluator.feasible(self._current(reused.joined(new)))

    def _current(self, pool: Pool) -> Pool:
        """The same pool, evaluated again if an objective turns out to be deterministic."""
        if not self._evaluator.update_deterministic_objectives(pool):
            return pool
        self._reset_models()
        return self._evaluator.evaluate(pool.points)

    def _new(self, points: Points, excluded: Sequence[bytes] = ()) -> Points:
        """The points that were not proposed or reported and are not excluded, without repetitions."""
        old = {*excluded, *self._results, *self._pending, *self._stopped}
        rows = {key: row for row, key in enumerate(_keys(points)) if key not in old}
        return points[list(rows.values())]

    def _measured(self) -> tuple[Points, Losses]:
        """The points and losses of all results that are no failures."""
        points, losses = [], []
        for point, metrics in self._results.values():
            if metrics is not None:
                points.append(point)
                losses.append([objective.loss(metrics[objective.metric]) for objective in self._objectives])
        return (
            np.array(points).reshape(-1, len(self._encoder.axes)),
            np.array(losses, dtype=np.float64).reshape(-1, len(self._objectives)),
        )

    def _nondominated(self, losses: Losses) -> NDArray[np.bool_]:
        return nondominated(losses, [Objective(objective.metric) for objective in self._objectives])

    def _fit_models(self, points: Points, losses: Losses) -> None:
        """Fit all models if there are new results."""
        if not self._models_outdated:
            return
        selection = np.arange(len(losses))[-MAX_MODEL_RESULTS:]
        if len(losses) > MAX_MODEL_RESULTS:
            selection = np.union1d(np.flatnonzero(self._nondominated(losses)), selection)
        rows = self._evaluator.rows(points[selection])
        for column in np.flatnonzero(~self._evaluator.deterministic_objectives):
            model = self._models.setdefault(int(column), ObjectiveModel(self._evaluator.features))
            model.fit(rows, losses[selection, column], self._evaluator.space_sample.rows)
        newest = list(self._results.values())[-MAX_MODEL_RESULTS:]
        failed = np.array([metrics is None for _, metrics in newest], dtype=np.float64)
        if failed.any():
            self._failure_model = self._failure_model or GaussianProcess(self._evaluator.features)
            rows = self._evaluator.rows(np.array([point for point, _ in newest]))
            self._failure_model.fit(rows, failed)
        self._models_outdated = False

    def _pending_rows(self) -> Rows | None:
        if not self._pending:
            return None
        return self._evaluator.rows(np.array(list(self._pending.values())))

    def _predict(self, pool: Pool, pending: Rows | None = None) -> list[Prediction]:
        """The predictions of each objective; deterministic ones have deviation 0."""
        predictions = []
        for column, deterministic in enumerate(self._evaluator.deterministic_objectives):
            if deterministic:
                predictions.append(Prediction(pool.losses[:, column], np.zeros(len(pool))))
            else:
                predictions.append(self._models[column].predict(pool.rows, pending))
        return predictions

    def _scores(self, pool: Pool, predictions: Sequence[Prediction], losses: Losses) -> Scores:
        """The expected improvement per second of each point; its novelty if no point is expected to improve the front.

        Volumes are of warped losses: if these are logarithms, halving a loss counts the same everywhere.
        """
        if self._pending:
            pending = self._evaluator.evaluate(np.array(list(self._pending.values())))
            medians = [prediction.median for prediction in self._predict(pending)]
            losses = np.concatenate([losses, np.column_stack(medians)])
        warped = [
            prediction.warping.warp(column) for prediction, column in zip(predictions, losses.T, strict=True)
        ]
        losses = np.column_stack(warped)
        front, reference = self._front_and_reference(losses, predictions)
        extent = np.maximum(np.ptp(losses, axis=0), MIN_RELATIVE_IMPROVEMENT)
        for exploration in EXPLORATION_FACTORS:
            improvement = expected_improvement(front, reference, predictions, exploration)
            if improvement.max() > MIN_RELATIVE_IMPROVEMENT * float(np.prod(extent)):
                return np.asarray(improvement * self._success_probability(pool) / pool.seconds)
        return self._novelty(pool)

    def _front_and_reference(self, losses: Losses, predictions: Sequence[Prediction]) -> tuple[Losses, Point]:
        """The front of these warped losses, and the reference point of its hypervolume.

        Limits are reference values. The others alternate between a point just beyond the front, which fills it, and
        quantiles over the whole space, which widen it; see `REFERENCE_QUANTILES`.
        """
        front = losses[self._nondominated(losses)]
        ideal, worst = front.min(axis=0), front.max(axis=0)
        quantile = REFERENCE_QUANTILES[len(losses) % len(REFERENCE_QUANTILES)]
        if quantile is None:
            reference = worst + 0.1 * np.maximum(worst - ideal, 1e-3 * np.ptp(losses, axis=0))
        else:
            quantiles = np.where(self._evaluator.deterministic_objectives, DETERMINISTIC_QUANTILE, quantile)
            reference = np.nanquantile(self._space_losses(), quantiles, axis=0).diagonal()
            reference = np.maximum(reference, ideal + 0.1 * np.ptp(losses, axis=0))
        for column, (objective, prediction) in enumerate(zip(self._objectives, predictions, strict=True)):
            if objective.limit is not None:
                limit = np.array([objective.loss(objective.limit)])
                reference[column] = prediction.warping.warp(limit)[0]
        extent = np.where(reference > ideal, reference - ideal, 1.0)
        nearest = np.argsort((front / extent).sum(axis=1), kind="stable")
        count = MAX_FRONT_POINTS.get(losses.shape[1], MAX_FRONT_POINTS_OTHERWISE)
        return front[nearest[:count]], reference

    def _space_losses(self) -> Losses:
        """The known losses, or the warped predicted ones, of the sample of the whole space."""
        sample = self._evaluator.space_sample
        columns = []
        for column, deterministic in enumerate(self._evaluator.deterministic_objectives):
            if deterministic:
                columns.append(sample.losses[:, column])
            else:
                columns.append(self._models[column].mean(sample.rows))
        return np.column_stack(columns)

    def _novelty(self, pool: Pool) -> Scores:
        """The variance of a linear model at each point, given all points that were proposed or reported."""
        proposed = [point for point, _ in self._results.values()] + list(self._pending.values())
        if not proposed:
            return np.zeros(len(pool))
        part = self._evaluator.features.effects
        rows = pool.rows[:, part]
        proposed_rows = self._evaluator.rows(np.array(proposed[-MAX_MODEL_RESULTS:]))[:, part]
        covariance = proposed_rows @ proposed_rows.T + NOVELTY_NOISE * np.eye(len(proposed_rows))
        across = rows @ proposed_rows.T
        explained = (across * np.linalg.solve(covariance, across.T).T).sum(axis=1)
        return np.asarray((rows**2).sum(axis=1) - explained)

    def _success_probability(self, pool: Pool) -> Scores:
        """The predicted probability that each point does not fail; 1 before the first failure."""
        if self._failure_model is None:
            return np.ones(len(pool))
        return self._failure_model.probability_below(pool.rows, 0.5)


def _key(point: Point) -> bytes:
    """The same key for points that differ only by rounding errors."""
    return _keys(point[None])[0]


def _keys(points: Points) -> list[bytes]:
    return [row.tobytes() for row in np.round(points, 9) + 0.0]
