"""The pure parts of benchmarks/front.py: the evaluation of the contestants' candidates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.front import Bounds, Point, Run, caught_up, front_size, ordered, reached, recorded, table

BOUNDS = Bounds(size_bytes=100.0, accuracy=0.9, guessing=0.5)
SMALL = Point(10.0, "small", 20.0, 0.6)
LARGE = Point(20.0, "large", 60.0, 0.8)
WORSE = Point(30.0, "worse", 70.0, 0.7)


def test_a_model_without_bytes_that_is_as_accurate_as_the_original_has_the_whole_share() -> None:
    assert BOUNDS.share([]) == 0
    assert BOUNDS.share([Point(1.0, "ideal", 0.0, 0.9)]) == pytest.approx(1.0)
    # (100 - 20) × (0.6 - 0.5) + (100 - 60) × (0.8 - 0.6), of 100 × 0.4
    assert BOUNDS.share([SMALL, LARGE, WORSE]) == pytest.approx(16 / 40)


def test_a_model_that_guesses_or_is_as_large_as_the_original_adds_nothing() -> None:
    assert BOUNDS.share([Point(1.0, "guesses", 10.0, 0.5), Point(1.0, "original", 100.0, 0.9)]) == 0


def test_only_candidates_measured_in_time_count() -> None:
    run = Run("slimfront", 0, (SMALL, LARGE, WORSE))
    assert run.until(20.0) == [SMALL, LARGE]
    assert reached(run, BOUNDS.share([SMALL]), BOUNDS) == 10.0
    assert reached(run, 0.4, BOUNDS) == 20.0
    assert reached(run, 0.5, BOUNDS) == math.inf


def test_equal_points_count_once_on_the_front() -> None:
    duplicate = Point(40.0, "another recipe", LARGE.size_bytes, LARGE.accuracy)
    assert front_size([SMALL, LARGE, WORSE, duplicate]) == 2
    assert front_size([]) == 0


def test_the_first_contestant_is_the_last_with_the_next_seed() -> None:
    assert ordered(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert ordered(["a", "b", "c"], 1) == ["b", "c", "a"]


def test_an_incomplete_line_is_no_candidate(tmp_path: Path) -> None:
    line = json.dumps({"ended": 105.0, "recipe": "small", "size_bytes": 20.0, "accuracy": 0.6})
    file = tmp_path / "trials.jsonl"
    assert recorded(file, 100.0) == []
    file.write_text(f"{line}\n{line[:30]}")
    assert recorded(file, 100.0) == [Point(5.0, "small", 20.0, 0.6)]


def test_the_table_has_a_row_for_each_seed_and_their_mean() -> None:
    runs = [Run(name, seed, (SMALL, LARGE)) for name in ("slimfront", "peer") for seed in (0, 1)]
    rows = table(runs, BOUNDS, 40.0).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows[:3]] == [
        ["| slimfront", "0"], ["| slimfront", "1"], ["| slimfront", "mean ± deviation"]
    ]  # fmt: skip
    assert rows[0] == "| slimfront | 0 | 0.2000 | 0.4000 | 0.4000 | 0.4000 | 2 | 2 | 2 |"


def test_the_time_until_slimfront_reaches_the_final_share_of_a_peer_is_reported() -> None:
    runs = [Run("slimfront", 0, (SMALL, LARGE)), Run("peer", 0, (WORSE,))]
    assert caught_up(runs, BOUNDS, 60.0) == [
        "- seed 0: slimfront reached the final share of peer after 0.2 minutes"
    ]
    runs = [Run("slimfront", 0, (SMALL,)), Run("peer", 0, (LARGE,))]
    assert caught_up(runs, BOUNDS, 60.0) == [
        "- seed 0: slimfront reached the final share of peer not in that time"
    ]
