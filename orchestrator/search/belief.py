"""Belief: what a number is expected to be at choices that were not tried, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import linalg, optimize
from scipy.special import ndtr

from orchestrator.search.features import Features, Rows
from orchestrator.search.improvement import Expected
from orchestrator.search.scale import Scale

Vector = Float[NDArray[np.float64], " points"]
Matrix = Float[NDArray[np.float64], "points others"]

_LEARNED_FROM = 160
"""Variances and lengths are found from so many results at most: that costs their number cubed, many times."""
_GROWTH = 1.1
_ROUNDS = 40
_LEAST_NOISE = 1e-6
_HINTED = 2.0
"""The variance of a hint's effect before any results: that of all knobs together, from which it is foretold."""
_APART = 1.5
"""Positive losses this many times apart may be believed about by their logarithms."""


class Belief:
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
        self.learned_from = 0
        self.evidence = -math.inf

    def fit(self, rows: Rows, values: Vector) -> None:
        """Take in all results. Variances and lengths are found anew when there are a tenth more than last time."""
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        y = (values - self._mean) / self._scale
        if len(values) >= _GROWTH * self._results:
            some = np.arange(len(y))
            if len(y) > _LEARNED_FROM:
                some = np.random.default_rng(len(y)).choice(len(y), _LEARNED_FROM, replace=False)
            self._learn(rows[some], y[some])
            self._results, self.learned_from = len(values), len(some)
        self._covariance = _Covariance.of(self._logarithms, self._features)
        self._rows = rows
        covariance = self._covariance.between(rows, rows)
        covariance[np.diag_indices(len(y))] += self._covariance.noise
        self._factor = linalg.cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        self._weights = linalg.cho_solve((self._factor, True), y, check_finite=False)

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

    def _learn(self, rows: Rows, y: Vector) -> None:
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
        self.evidence = -float(found.fun) - len(y) * math.log(self._scale)


class LossBelief:
    """A belief of a metric's losses, or of their logarithms where these are explained better: a perplexity's
    differences are its logarithm's."""

    def __init__(self, features: Features) -> None:
        self._plain, self._logarithm = Belief(features), Belief(features)
        self._belief, self._scale = self._plain, Scale()

    def fit(self, rows: Rows, losses: Vector, everywhere: Rows) -> None:
        """Take in all results. everywhere: rows of choices that were drawn without looking at results. What is usual is
        told by what is believed of these: by results it would be what the search likes."""
        usual = (
            losses
            if not self._belief.learned_from
            else self._scale.losses(self._belief.predict(everywhere)[0])
        )
        self._belief, self._scale = self._plain, Scale.of(usual, logarithm=False)
        plain = self._evidence(losses, rows)
        if losses.min() > 0 and losses.max() > _APART * losses.min():
            before = self._belief, self._scale
            self._belief, self._scale = self._logarithm, Scale.of(usual, logarithm=True)
            if self._evidence(losses, rows) < plain:
                self._belief, self._scale = before

    def predict(self, rows: Rows, awaited: Rows | None = None) -> Expected:
        return Expected(*self._belief.predict(rows, awaited), self._scale)

    def outcome(self, rows: Rows) -> Expected:
        """What measuring would give, no surer than this belief has been right so far."""
        return Expected(*self._belief.outcome(rows), self._scale)

    def _evidence(self, losses: Vector, rows: Rows) -> float:
        """For each result, the logarithm of the losses' density by this belief on this scale, fitted to them."""
        self._belief.fit(rows, self._scale.seen(losses))
        return self._belief.evidence / self._belief.learned_from + self._scale.stretch(losses) / len(losses)


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
        return np.asarray(each + self.pairs * each**2 + self.whole * _matern(self._apart(left, right))[0])

    def own(self, rows: Rows) -> Vector:
        """The covariance of each point with itself."""
        part = self.features.effects
        each = rows[:, part] ** 2 @ self.variances[self.features.knobs[part]]
        return np.asarray(each + self.pairs * each**2 + self.whole)

    def evidence(self, rows: Rows, y: Vector) -> tuple[float, Vector]:
        """The logarithm of the marginal likelihood (eq. 5.8), and its slope (eq. 5.9) by the numbers' logarithms."""
        each = self._alone(rows, rows)
        smooth, fall = _matern(self._apart(rows, rows))
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


def _matern(squares: Matrix) -> tuple[Matrix, Matrix]:
    """The Matérn 5/2 covariance (eq. 4.17), and what it changes by a length's logarithm, for each unit of the squared
    distance along that length."""
    root = np.sqrt(5.0 * squares)
    fading = np.exp(-root)
    return (1 + root + root**2 / 3) * fading, (5.0 / 3.0) * (1 + root) * fading
