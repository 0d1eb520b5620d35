"""Belief: what a number is expected to be at choices that were not tried, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import linalg, optimize
from scipy.special import ndtr

from orchestrator.pareto.expected_improvement import Expected
from orchestrator.pareto.warping import Scale
from orchestrator.search.features import Features, Rows

Vector = Float[NDArray[np.float64], " points"]
Matrix = Float[NDArray[np.float64], "points others"]

_LEARNED_FROM = 160
"""Variances and lengths are found from so many results at most: that costs their number cubed, many times."""
_GROWTH = 1.1
_EXTENDED = 200
"""With more results than that, the factor of their covariance is extended. A whole one takes little with fewer, and
comes out the same bit for bit however results came."""
_ROUNDS = 40
_LEAST_NOISE = 1e-6
_HINTED = 2.0
"""The variance of a hint's effect before any results: that of all knobs together, from which it is foretold."""
_APART = 1.5
"""Positive losses this many times apart may be believed about by their logarithms."""


class GaussianProcess:
    """A Gaussian process (Rasmussen & Williams 2006, eq. 2.25 and 2.26) whose covariance is a sum of three: each knob
    by itself, knobs in pairs as far as they do something by themselves, and all at once by their distance (Matérn 5/2,
    with a length for each knob):

        e(x, y) = Σ_b v_b f_b(x)·f_b(y),    k(x, y) = e(x, y) + p e(x, y)² + s M(‖(x − y) / ℓ‖)

    Knobs that act alone are learned from few results, and how they act together is not missed. The variances v, p, s,
    the lengths ℓ and the noise are those of the highest posterior, with log-normal priors: what explains nothing
    shrinks. Values are standardized.
    """

    def __init__(self, features: Features) -> None:
        self._features = features
        count = max(features.count, 1)
        # Logarithms of v, ℓ, p, s and the noise.
        self._means = np.concatenate([
            np.where(features.hints, math.log(_HINTED), math.log(2.0 / count)),
            np.full(features.count, math.log(0.7 * math.sqrt(count))),
            [math.log(0.1), math.log(0.2), math.log(1e-3)],
        ])  # fmt: skip
        self._widths = np.concatenate([
            np.full(features.count, 1.5), np.full(features.count, 1.0), [1.5, 1.5, 2.0],
        ])  # fmt: skip
        self._logarithms = self._means.copy()
        self._results = 0
        self._factor: Matrix = np.zeros((0, 0))
        self.learned_from = 0
        self.evidence = -math.inf

    def fit(self, rows: Rows, values: Vector) -> None:
        """Take in all results."""
        self.learn(rows, values)
        self._mean, self._scale, y = _standardized(values)
        self._factorize(rows)
        self._weights = linalg.cho_solve((self._factor, True), y, check_finite=False)

    def learn(self, rows: Rows, values: Vector) -> None:
        """Find variances and lengths anew, where there are a tenth more results than last time. That is all that
        `evidence` needs; to predict takes a fit."""
        if len(values) < _GROWTH * self._results:
            return
        _, scale, y = _standardized(values)
        some = np.arange(len(y))
        if len(y) > _LEARNED_FROM:
            some = np.random.default_rng(len(y)).choice(len(y), _LEARNED_FROM, replace=False)
        self._optimize(rows[some], y[some])
        self.evidence -= len(some) * math.log(scale)
        self._results, self.learned_from = len(values), len(some)
        self._covariance = _Covariance.of(self._logarithms, self._features)
        self._rows = rows[:0]

    def mean(self, rows: Rows) -> Vector:
        """Of what is there; as `predict` has it, without what deviations take."""
        return np.asarray(
            self._mean + self._scale * (self._covariance.between(rows, self._rows) @ self._weights)
        )

    def predict(self, rows: Rows, awaited: Rows | None = None) -> tuple[Vector, Vector]:
        """Mean and standard deviation of what is there, without the noise of measuring it.

        awaited: what is being measured. That it comes out as believed would change no mean, but whatever comes out
        leaves less to be told by choices like it (Ginsbourger et al. 2010, Kriging is well-suited to parallelize
        optimization, §4.2).
        """
        across = self._covariance.between(rows, self._rows)
        half = self._halved(across)
        left = self._covariance.own(rows) - (half**2).sum(axis=0)
        if awaited is not None and len(awaited):
            theirs = self._halved(self._covariance.between(awaited, self._rows))
            covariance = self._covariance.between(awaited, awaited) - theirs.T @ theirs
            covariance[np.diag_indices(len(awaited))] += self._covariance.noise
            factor = linalg.cholesky(covariance, lower=True, check_finite=False)
            shared = self._covariance.between(awaited, rows) - theirs.T @ half
            left -= (linalg.solve_triangular(factor, shared, lower=True, check_finite=False) ** 2).sum(axis=0)
        left = np.maximum(left, 1e-10)
        return self._mean + self._scale * (across @ self._weights), self._scale * np.sqrt(left)

    def outcome(self, rows: Rows) -> tuple[Vector, Vector]:
        """Mean and standard deviation of what measuring there would give. It is taken to err no less than it did, on
        average, of each result by all others (Rasmussen & Williams 2006, eq. 5.12), neither by itself nor as a multiple
        of what it claimed."""
        mean, deviation = self.predict(rows)
        inverse = linalg.solve_triangular(
            self._factor, np.eye(len(self._rows)), lower=True, check_finite=False
        )
        precision = (inverse**2).sum(axis=0)
        surprise = math.sqrt(float((self._weights**2 / precision).mean()))
        usual = self._scale * math.sqrt(float(((self._weights / precision) ** 2).mean()))
        claimed = np.hypot(deviation, self._scale * math.sqrt(self._covariance.noise))
        return mean, np.maximum(max(surprise, 1.0) * claimed, usual)

    def _halved(self, across: Matrix) -> Matrix:
        """L⁻¹ of these covariances with the results, a column for each row."""
        return np.asarray(linalg.solve_triangular(self._factor, across.T, lower=True, check_finite=False))

    def below(self, rows: Rows, bound: float) -> Vector:
        """The probability that what is there is below a bound."""
        mean, deviation = self.predict(rows)
        return np.asarray(ndtr((bound - mean) / deviation))

    def _factorize(self, rows: Rows) -> None:
        """The Cholesky factor of the results' covariance. Where there are many, only more than last time, and nothing
        was learned since, it is the last one with rows added: its upper left part is the same."""
        had = len(self._rows)
        if had < _EXTENDED or not np.array_equal(self._rows, rows[:had]):
            had = 0
        new = rows[had:]
        factor = np.zeros((len(rows), len(rows)), order="F")
        left = self._covariance.between(new, new)
        left[np.diag_indices(len(new))] += self._covariance.noise
        if had:
            factor[:had, :had] = self._factor
            half = self._halved(self._covariance.between(new, self._rows))
            factor[had:, :had] = half.T
            left -= half.T @ half
        factor[had:, had:] = linalg.cholesky(left, lower=True, overwrite_a=True, check_finite=False)
        self._rows, self._factor = rows, factor

    def _optimize(self, rows: Rows, y: Vector) -> None:
        bounds = [(mean - 6.0, mean + 6.0) for mean in self._means]
        bounds[-1] = (math.log(_LEAST_NOISE), 0.0)

        def loss(logarithms: Vector) -> tuple[float, Vector]:
            evidence, slope = _Covariance.of(logarithms, self._features).evidence(rows, y)
            away = (logarithms - self._means) / self._widths
            return 0.5 * float(away @ away) - evidence, away / self._widths - slope

        found = optimize.minimize(
            loss, self._logarithms, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _ROUNDS}
        )
        self._logarithms = found.x
        self.evidence = -float(found.fun)


class ObjectiveModel:
    """A belief of a metric's losses, or of their logarithms where these are explained better: a perplexity's
    differences are its logarithm's."""

    def __init__(self, features: Features) -> None:
        self._plain, self._logarithm = GaussianProcess(features), GaussianProcess(features)
        self._belief, self._scale = self._plain, Scale()

    def fit(self, rows: Rows, losses: Vector, everywhere: Rows) -> None:
        """Take in all results. everywhere: rows of choices that were drawn without looking at results. What is usual is
        told by what is believed of these: by results it would be what the search likes."""
        usual = losses if not self._belief.learned_from else self._scale.losses(self._belief.mean(everywhere))
        plain = Scale.of(usual, logarithm=False)
        self._plain.learn(rows, plain.seen(losses))
        used = self._plain, plain
        if losses.min() > 0 and losses.max() > _APART * losses.min():
            logarithm = Scale.of(usual, logarithm=True)
            self._logarithm.learn(rows, logarithm.seen(losses))
            if _density(self._logarithm, logarithm, losses) >= _density(self._plain, plain, losses):
                used = self._logarithm, logarithm
        # The other one is not fitted: nothing is predicted by it.
        self._belief, self._scale = used
        self._belief.fit(rows, self._scale.seen(losses))

    def predict(self, rows: Rows, awaited: Rows | None = None) -> Expected:
        return Expected(*self._belief.predict(rows, awaited), self._scale)

    def mean(self, rows: Rows) -> Vector:
        """What is expected there, as seen on the scale."""
        return self._belief.mean(rows)

    def outcome(self, rows: Rows) -> Expected:
        """What measuring would give, no surer than this belief has been right so far."""
        return Expected(*self._belief.outcome(rows), self._scale)


def _standardized(values: Vector) -> tuple[float, float, Vector]:
    """Mean, standard deviation (1 where they are all equal), and the values with these taken out."""
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    return mean, scale, (values - mean) / scale


def _density(belief: GaussianProcess, scale: Scale, losses: Vector) -> float:
    """For each result, the logarithm of the losses' density by what this belief learned on this scale."""
    return belief.evidence / belief.learned_from + scale.stretch(losses) / len(losses)


@dataclass(frozen=True)
class _Covariance:
    """A covariance with its numbers; variances and lengths are one a knob."""

    features: Features
    variances: Vector
    lengths: Vector
    pairs: float
    whole: float
    noise: float

    @classmethod
    def of(cls, logarithms: Vector, features: Features) -> _Covariance:
        values, count = np.exp(logarithms), features.count
        return cls(
            features, values[:count], values[count : 2 * count], *(float(v) for v in values[2 * count :])
        )

    def between(self, left: Rows, right: Rows) -> Matrix:
        each = self._alone(left, right)
        return np.asarray(each + self.pairs * each**2 + self.whole * _matern(self._apart(left, right)))

    def own(self, rows: Rows) -> Vector:
        """The covariance of each point with itself."""
        part = self.features.effects
        each = rows[:, part] ** 2 @ self.variances[self.features.knobs[part]]
        return np.asarray(each + self.pairs * each**2 + self.whole)

    def evidence(self, rows: Rows, y: Vector) -> tuple[float, Vector]:
        """The logarithm of the marginal likelihood (eq. 5.8), and its slope (eq. 5.9) by the numbers' logarithms."""
        each = self._alone(rows, rows)
        apart = self._apart(rows, rows)
        smooth, fall = _matern(apart), _fall(apart)
        covariance = each + self.pairs * each**2 + self.whole * smooth
        covariance[np.diag_indices(len(y))] += self.noise
        factor = linalg.cholesky(covariance, lower=True, check_finite=False)
        inverse = linalg.cho_solve((factor, True), np.eye(len(y)), check_finite=False)
        alpha = inverse @ y
        found = (
            -0.5 * float(y @ alpha)
            - float(np.log(np.diag(factor)).sum())
            - 0.5 * len(y) * math.log(2 * math.pi)
        )
        pull = 0.5 * (np.outer(alpha, alpha) - inverse)
        slope = np.concatenate([
            self._by_variance(rows, pull * (1 + 2 * self.pairs * each)),
            self._by_length(rows, self.whole * pull * fall),
            [
                self.pairs * float((pull * each**2).sum()),
                self.whole * float((pull * smooth).sum()),
                self.noise * float(np.trace(pull)),
            ],
        ])  # fmt: skip
        return found, slope

    def _by_variance(self, rows: Rows, pull: Matrix) -> Vector:
        part = self.features.effects
        columns = (rows[:, part] * (pull @ rows[:, part])).sum(axis=0)
        return self.variances * np.bincount(self.features.knobs[part], columns, self.features.count)

    def _by_length(self, rows: Rows, pull: Matrix) -> Vector:
        """Σ_ij pull_ij (x_i − x_j)² of each column, for a symmetric pull."""
        part = self.features.distances
        places = rows[:, part]
        columns = 2 * (pull.sum(axis=0) @ places**2) - 2 * (places * (pull @ places)).sum(axis=0)
        return np.bincount(self.features.knobs[part], columns, self.features.count) / self.lengths**2

    def _alone(self, left: Rows, right: Rows) -> Matrix:
        part = self.features.effects
        return np.asarray((left[:, part] * self.variances[self.features.knobs[part]]) @ right[:, part].T)

    def _apart(self, left: Rows, right: Rows) -> Matrix:
        """Squared distances, each knob's in its own length."""
        part = self.features.distances
        lengths = self.lengths[self.features.knobs[part]]
        one, other = left[:, part] / lengths, right[:, part] / lengths
        squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :]
        return np.asarray(np.maximum(squares - 2 * one @ other.T, 0.0))


def _matern(squares: Matrix) -> Matrix:
    """The Matérn 5/2 covariance (eq. 4.17)."""
    root = np.sqrt(5.0 * squares)
    return np.asarray((1 + root + root**2 / 3) * np.exp(-root))


def _fall(squares: Matrix) -> Matrix:
    """What the Matérn 5/2 covariance changes by a length's logarithm, for each unit of the squared distance along that
    length."""
    root = np.sqrt(5.0 * squares)
    return np.asarray((5.0 / 3.0) * (1 + root) * np.exp(-root))
