"""What two artifacts' timings say of each other, and how surely."""

import numpy as np
import pytest

from jobs.measurement.paired_timing import paired_ratio


def test_six_pairs_lie_between_their_extremes_in_31_of_32_cases() -> None:
    found = paired_ratio([1.0] * 6, [0.5, 0.52, 0.48, 0.51, 0.49, 0.9])
    assert found.ratio == pytest.approx(0.505)
    assert (found.low, found.high) == (0.48, 0.9)
    assert found.confidence == 31 / 32


def test_twelve_pairs_do_without_two_outliers_on_either_side() -> None:
    found = paired_ratio([1.0] * 12, [*np.linspace(0.5, 0.61, 12)])
    assert (found.low, found.high) == (pytest.approx(0.52), pytest.approx(0.59))
    assert found.confidence == pytest.approx(1 - 2 * (1 + 12 + 66) / 4096)


def test_five_pairs_tell_that_they_are_less_sure_than_was_asked() -> None:
    found = paired_ratio([1.0] * 5, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert (found.ratio, found.low, found.high) == (0.7, 0.5, 0.9)
    assert found.confidence == 15 / 16
    assert paired_ratio([2.0], [1.0]).confidence == 0.0


def test_a_machine_that_slows_down_does_not_move_the_ratio() -> None:
    drift = np.linspace(1.0, 3.0, 12)
    found = paired_ratio([*(10 * drift)], [*(8 * drift)])
    assert found.ratio == pytest.approx(0.8)
    assert found.high - found.low < 1e-9


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        noise = np.exp(generator.standard_t(2, (2, 12)) * 0.05)
        found = paired_ratio([*(10 * noise[0])], [*(7 * noise[1])])
        covered += found.low <= 0.7 <= found.high
    assert 0.945 < covered / 2000 < 0.98


def test_timings_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1 timings, expected pairs"):
        paired_ratio([1.0, 2.0], [1.0])
