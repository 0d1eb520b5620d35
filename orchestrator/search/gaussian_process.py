"""Gaussian processes: predictions, with their uncertainty, of metrics at choices that were not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its modules are imported at their first use: commands that only plan do not need them
from jaxtyping import Float
from numpy.typing import NDArray

from orchestrator.pareto.expected_improvement import Prediction
from orchestrator.pareto.warping import Warping
from orchestrator.search.features import Features, Rows

Vector = Float[NDArray[np.float64], " points"]
Matrix = Float[NDArray[np.float64], "points others"]

_MAX_HYPERPARAMETER_RESULTS = 160
"""Maximum number of results that hyperparameters are fitted to, a random subset of all: the time of each step of
the optimizer grows with the cube of this number."""
_REFIT_GROWTH = 1.1
"""Fit hyperparameters again when the number of results has grown by this factor: a tenth more changes them little."""
_MIN_EXTENDED_RESULTS = 200
"""With more results than this, new rows are appended to the Cholesky factor. A complete factorization of fewer takes
little time, and its bits do not depend on the order in which results arrived."""
_OPTIMIZER_ITERATIONS = 40
"""Maximum per fit. Fits start from the last hyperparameters, so that later ones continue where this one stopped."""
_MIN_NOISE = 1e-6
"""Smallest noise variance of standardized values, which keeps the covariance positive definite."""
_HINT_VARIANCE = 2.0
"""Prior variance of the effect of a hint: that of all knobs together, since a hint is predicted from all of them."""
_MIN_LOGARITHM_RATIO = 1.5
"""Positive losses whose maximum is more than this factor above the minimum may be modelled by their logarithms. Within
a smaller range, both models are nearly the same."""


class GaussianProcess:
    """A Gaussian process (Rasmussen & Williams 2006, eq. 2.25 and 2.26) with a covariance of three terms.

    The terms are the additive effects of knobs, products of pairs of these effects, and a Matérn 5/2 covariance of all
    knobs with a length scale per knob:

        e(x, y) = Σ_b v_b f_b(x)·f_b(y),    k(x, y) = e(x, y) + p e(x, y)² + s M(‖(x − y) / ℓ‖)

    The first term is learned from few results, the others describe interactions. The hyperparameters (variances v, p,
    s, length scales ℓ, noise) maximize the posterior with log-normal priors, so that terms that explain nothing shrink.
    Values are standardized.
    """

    def __init__(self, features: Features) -> None:
        self._features = features
        count = max(features.count, 1)
        # Logarithms of v, ℓ, p, s and the noise.
        self._means = np.concatenate([
            np.where(features.hints, math.log(_HINT_VARIANCE), math.log(2.0 / count)),
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
        """Number of results that `evidence` refers to."""
        self.evidence = -math.inf
        """Logarithm of the posterior density of the hyperparameters and the values."""

    def fit(self, rows: Rows, values: Vector) -> None:
        """Condition the process on all results."""
        self.fit_hyperparameters(rows, values)
        self._mean, self._scale, y = _standardize(values)
        self._factorize(rows)
        self._weights = scipy.linalg.cho_solve((self._factor, True), y, check_finite=False)

    def fit_hyperparameters(self, rows: Rows, values: Vector) -> None:
        """Fit the hyperparameters and `evidence` if there are a tenth more results than last time.

        `predict` needs `fit`.
        """
        if len(values) < _REFIT_GROWTH * self._results:
            return
        _, scale, y = _standardize(values)
        sample = np.arange(len(y))
        if len(y) > _MAX_HYPERPARAMETER_RESULTS:
            generator = np.random.default_rng(len(y))
            sample = generator.choice(len(y), _MAX_HYPERPARAMETER_RESULTS, replace=False)
        self._optimize(rows[sample], y[sample])
        self.evidence -= len(sample) * math.log(scale)
        self._results, self.learned_from = len(values), len(sample)
        self._covariance = _Covariance.of(self._logarithms, self._features)
        self._rows = rows[:0]

    def mean(self, rows: Rows) -> Vector:
        """Return the means of `predict` alone, which takes less time."""
        return np.asarray(
            self._mean + self._scale * (self._covariance.between(rows, self._rows) @ self._weights)
        )

    def predict(self, rows: Rows, pending: Rows | None = None) -> tuple[Vector, Vector]:
        """Return the mean and standard deviation at these rows, without the noise of a measurement.

        pending: rows that are being measured. Their results, assumed to equal the mean, would change no mean, but they
        reduce the deviations (Ginsbourger et al. 2010, Kriging is well-suited to parallelize optimization, §4.2).
        """
        across = self._covariance.between(rows, self._rows)
        half = self._whiten(across)
        variance = self._covariance.diagonal(rows) - (half**2).sum(axis=0)
        if pending is not None and len(pending):
            pending_half = self._whiten(self._covariance.between(pending, self._rows))
            covariance = self._covariance.between(pending, pending) - pending_half.T @ pending_half
            covariance[np.diag_indices(len(pending))] += self._covariance.noise
            factor = scipy.linalg.cholesky(covariance, lower=True, check_finite=False)
            shared = self._covariance.between(pending, rows) - pending_half.T @ half
            explained = scipy.linalg.solve_triangular(factor, shared, lower=True, check_finite=False)
            variance -= (explained**2).sum(axis=0)
        variance = np.maximum(variance, 1e-10)
        return self._mean + self._scale * (across @ self._weights), self._scale * np.sqrt(variance)

    def predict_result(self, rows: Rows) -> tuple[Vector, Vector]:
        """Return the mean and standard deviation of measurements at these rows, with calibrated deviations.

        They are at least as large as the leave-one-out errors of the results so far (Rasmussen & Williams 2006,
        eq. 5.12): neither the mean error nor the mean ratio of error to predicted deviation is smaller.
        """
        mean, deviation = self.predict(rows)
        inverse = scipy.linalg.solve_triangular(
            self._factor, np.eye(len(self._rows)), lower=True, check_finite=False
        )
        precision = (inverse**2).sum(axis=0)
        error_ratio = math.sqrt(float((self._weights**2 / precision).mean()))
        mean_error = self._scale * math.sqrt(float(((self._weights / precision) ** 2).mean()))
        predicted = np.hypot(deviation, self._scale * math.sqrt(self._covariance.noise))
        return mean, np.maximum(max(error_ratio, 1.0) * predicted, mean_error)

    def _whiten(self, across: Matrix) -> Matrix:
        """L⁻¹ times these covariances with the results: one column per row of `across`."""
        return np.asarray(
            scipy.linalg.solve_triangular(self._factor, across.T, lower=True, check_finite=False)
        )

    def probability_below(self, rows: Rows, bound: float) -> Vector:
        """Return the probability that the value at these rows is below a bound."""
        mean, deviation = self.predict(rows)
        return np.asarray(scipy.special.ndtr((bound - mean) / deviation))

    def _factorize(self, rows: Rows) -> None:
        """Compute the Cholesky factor of the results' covariance.

        The last factor is extended if there are many results, the hyperparameters are the same, and rows were only
        appended: then its upper left part stays the same.
        """
        reused = len(self._rows)
        if reused < _MIN_EXTENDED_RESULTS or not np.array_equal(self._rows, rows[:reused]):
            reused = 0
        new = rows[reused:]
        factor = np.zeros((len(rows), len(rows)), order="F")
        corner = self._covariance.between(new, new)
        corner[np.diag_indices(len(new))] += self._covariance.noise
        if reused:
            factor[:reused, :reused] = self._factor
            half = self._whiten(self._covariance.between(new, self._rows))
            factor[reused:, :reused] = half.T
            corner -= half.T @ half
        factor[reused:, reused:] = scipy.linalg.cholesky(
            corner, lower=True, overwrite_a=True, check_finite=False
        )
        self._rows, self._factor = rows, factor

    def _optimize(self, rows: Rows, y: Vector) -> None:
        bounds = [(mean - 6.0, mean + 6.0) for mean in self._means]
        bounds[-1] = (math.log(_MIN_NOISE), 0.0)

        def loss(logarithms: Vector) -> tuple[float, Vector]:
            evidence, gradient = _Covariance.of(logarithms, self._features).evidence(rows, y)
            deviation = (logarithms - self._means) / self._widths
            return 0.5 * float(deviation @ deviation) - evidence, deviation / self._widths - gradient

        result = scipy.optimize.minimize(
            loss,
            self._logarithms,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": _OPTIMIZER_ITERATIONS},
        )
        self._logarithms = result.x
        self.evidence = -float(result.fun)


class ObjectiveModel:
    """A Gaussian process of an objective's warped losses or of their logarithms, whichever explains the results better.

    The logarithm suits metrics such as perplexity, whose ratios are comparable.
    """

    def __init__(self, features: Features) -> None:
        self._plain, self._logarithm = GaussianProcess(features), GaussianProcess(features)
        self._process, self._warping = self._plain, Warping()

    def fit(self, rows: Rows, losses: Vector, space_sample: Rows) -> None:
        """Fit the model to all results.

        space_sample: rows of choices that were drawn independently of results. Their predictions determine the
        warping; the results themselves are no fair sample, since the search prefers good choices.
        """
        typical = losses
        if self._process.learned_from:
            typical = self._warping.unwarp(self._process.mean(space_sample))
        plain = Warping.fit(typical, logarithm=False)
        self._plain.fit_hyperparameters(rows, plain.warp(losses))
        process, warping = self._plain, plain
        if losses.min() > 0 and losses.max() > _MIN_LOGARITHM_RATIO * losses.min():
            logarithm = Warping.fit(typical, logarithm=True)
            self._logarithm.fit_hyperparameters(rows, logarithm.warp(losses))
            if _log_density(self._logarithm, logarithm, losses) >= _log_density(self._plain, plain, losses):
                process, warping = self._logarithm, logarithm
        # The other process is not conditioned on the results, since it predicts nothing.
        self._process, self._warping = process, warping
        self._process.fit(rows, self._warping.warp(losses))

    def predict(self, rows: Rows, pending: Rows | None = None) -> Prediction:
        """See `GaussianProcess.predict`."""
        return Prediction(*self._process.predict(rows, pending), self._warping)

    def mean(self, rows: Rows) -> Vector:
        """Return the means of the warped losses."""
        return self._process.mean(rows)

    def predict_result(self, rows: Rows) -> Prediction:
        """See `GaussianProcess.predict_result`."""
        return Prediction(*self._process.predict_result(rows), self._warping)


def _standardize(values: Vector) -> tuple[float, float, Vector]:
    """The mean, the standard deviation (1 if all values are equal), and the standardized values."""
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    return mean, scale, (values - mean) / scale


def _log_density(process: GaussianProcess, warping: Warping, losses: Vector) -> float:
    """The logarithm of the density of the losses, not warped, per result."""
    return process.evidence / process.learned_from + warping.log_derivative(losses) / len(losses)


@dataclass(frozen=True)
class _Covariance:
    """The covariance function with its hyperparameters."""

    features: Features
    variances: Vector
    """v, one per knob."""
    lengths: Vector
    """ℓ, one per knob."""
    pairs: float
    """p."""
    joint: float
    """s."""
    noise: float

    @classmethod
    def of(cls, logarithms: Vector, features: Features) -> _Covariance:
        values, count = np.exp(logarithms), features.count
        scalars = (float(value) for value in values[2 * count :])
        return cls(features, values[:count], values[count : 2 * count], *scalars)

    def between(self, rows: Rows, columns: Rows) -> Matrix:
        """Return k(x, y) for each x in `rows` and y in `columns`."""
        effects = self._effects(rows, columns)
        matern = _matern(self._squared_distances(rows, columns))
        return np.asarray(effects + self.pairs * effects**2 + self.joint * matern)

    def diagonal(self, rows: Rows) -> Vector:
        """Return k(x, x) for each row x."""
        part = self.features.effects
        effects = rows[:, part] ** 2 @ self.variances[self.features.knobs[part]]
        return np.asarray(effects + self.pairs * effects**2 + self.joint)

    def evidence(self, rows: Rows, y: Vector) -> tuple[float, Vector]:
        """Return the log marginal likelihood (eq. 5.8) and its gradient (eq. 5.9) by the log hyperparameters."""
        effects = self._effects(rows, rows)
        squares = self._squared_distances(rows, rows)
        smooth, slope = _matern(squares), _matern_slope(squares)
        covariance = effects + self.pairs * effects**2 + self.joint * smooth
        covariance[np.diag_indices(len(y))] += self.noise
        factor = scipy.linalg.cholesky(covariance, lower=True, check_finite=False)
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(y)), check_finite=False)
        alpha = inverse @ y
        likelihood = (
            -0.5 * float(y @ alpha)
            - float(np.log(np.diag(factor)).sum())
            - 0.5 * len(y) * math.log(2 * math.pi)
        )
        # The derivative of the likelihood by the covariance.
        sensitivity = 0.5 * (np.outer(alpha, alpha) - inverse)
        gradient = np.concatenate([
            self._variance_gradient(rows, sensitivity * (1 + 2 * self.pairs * effects)),
            self._length_gradient(rows, self.joint * sensitivity * slope),
            [
                self.pairs * float((sensitivity * effects**2).sum()),
                self.joint * float((sensitivity * smooth).sum()),
                self.noise * float(np.trace(sensitivity)),
            ],
        ])  # fmt: skip
        return likelihood, gradient

    def _variance_gradient(self, rows: Rows, sensitivity: Matrix) -> Vector:
        part = self.features.effects
        columns = (rows[:, part] * (sensitivity @ rows[:, part])).sum(axis=0)
        return self.variances * np.bincount(self.features.knobs[part], columns, self.features.count)

    def _length_gradient(self, rows: Rows, sensitivity: Matrix) -> Vector:
        """Σ_ij sensitivity_ij (x_i − x_j)² of each column, for a symmetric matrix."""
        part = self.features.distances
        x = rows[:, part]
        columns = 2 * (sensitivity.sum(axis=0) @ x**2) - 2 * (x * (sensitivity @ x)).sum(axis=0)
        return np.bincount(self.features.knobs[part], columns, self.features.count) / self.lengths**2

    def _effects(self, rows: Rows, columns: Rows) -> Matrix:
        """e(x, y)."""
        part = self.features.effects
        return np.asarray((rows[:, part] * self.variances[self.features.knobs[part]]) @ columns[:, part].T)

    def _squared_distances(self, rows: Rows, columns: Rows) -> Matrix:
        """‖(x − y) / ℓ‖²."""
        part = self.features.distances
        lengths = self.lengths[self.features.knobs[part]]
        x, y = rows[:, part] / lengths, columns[:, part] / lengths
        squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :]
        return np.asarray(np.maximum(squares - 2 * x @ y.T, 0.0))


def _matern(squares: Matrix) -> Matrix:
    """The Matérn 5/2 covariance (eq. 4.17) of squared distances."""
    root = np.sqrt(5.0 * squares)
    return np.asarray((1 + root + root**2 / 3) * np.exp(-root))


def _matern_slope(squares: Matrix) -> Matrix:
    """The derivative of the Matérn 5/2 covariance by the logarithm of a length scale, per unit of the squared distance
    along that knob."""
    root = np.sqrt(5.0 * squares)
    return np.asarray((5.0 / 3.0) * (1 + root) * np.exp(-root))
