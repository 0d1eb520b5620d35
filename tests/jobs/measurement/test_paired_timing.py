"""Paired timings of two artifacts give a ratio with a confidence interval."""

import numpy as np
import pytest

from jobs.measurement.paired_timing import paired_ratio


def test_six_pairs_have_their_extremes_as_interval_with_confidence_31_of_32() -> None:
    estimate = paired_ratio([1.0] * 6, [0.5, 0.52, 0.48, 0.51, 0.49, 0.9])
    assert estimate.ratio == pytest.approx(0.505)
    assert (estimate.low, estimate.high) == (0.48, 0.9)
    assert estimate.confidence == 31 / 32


def test_twelve_pairs_exclude_two_outliers_on_either_side() -> None:
    estimate = paired_ratio([1.0] * 12, [*np.linspace(0.5, 0.61, 12)])
    assert (estimate.low, estimate.high) == (pytest.approx(0.52), pytest.approx(0.59))
    assert estimate.confidence == pytest.approx(1 - 2 * (1 + 12 + 66) / 4096)


def test_five_pairs_report_a_lower_confidence_than_requested() -> None:
    estimate = paired_ratio([1.0] * 5, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert (estimate.ratio, estimate.low, estimate.high) == (0.7, 0.5, 0.9)
    assert estimate.confidence == 15 / 16
    assert paired_ratio([2.0], [1.0]).confidence == 0.0


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    drift = np.linspace(1.0, 3.0, 12)
    estimate = paired_ratio([*(10 * drift)], [*(8 * drift)])
    assert estimate.ratio == pytest.approx(0.8)
    assert estimate.high - estimate.low < 1e-9


def test_the_interval_covers_the_true_ratio_at_its_confidence() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        noise = np.exp(generator.standard_t(2, (2, 12)) * 0.05)
        estimate = paired_ratio([*(10 * noise[0])], [*(7 * noise[1])])
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.945 < covered / 2000 < 0.98


def test_unpaired_timings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1 timings, expected pairs"):
        paired_ratio([1.0, 2.0], [1.0])
