"""Time two artifacts in turns, so that a drift of the machine's speed affects both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.measurement.stopwatch import Request, Stopwatch, Turn, started
from jobs.measurement.timing import PARTS, Part, milliseconds

_DEFAULT_PAIRS = 6
"""The smallest number whose minimum and maximum ratio enclose the true median in 19 of 20 cases."""
_TURNS_PER_PAIR = 4
_TURN = Turn(repeats=5, seconds=0.25)
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """The time of the second artifact divided by that of the first, with a confidence interval."""

    ratio: float
    """Median of the pairs' ratios."""
    low: float
    high: float
    confidence: float
    """Probability that the true median lies between low and high; below the requested one if there are few pairs."""


@dataclass(frozen=True)
class Paired:
    """Milliseconds by part, one value per pair, and the ratios (second to first)."""

    first_ms: dict[Part, list[float]]
    second_ms: dict[Part, list[float]]
    ratios: dict[Part, Ratio]


def time_pair(first: Request, second: Request, pairs: int = _DEFAULT_PAIRS) -> Paired:
    """Time two artifacts against each other. Nothing else should run on the machine.

    A pair is two new processes that take turns, A B B A A B B A: only one computes at a time, and changes of the
    machine affect both. Every pair has new processes, because the memory placement of a process changes its speed by
    some percent for as long as it lives. So the pairs are independent, and their spread includes this effect.
    """
    first_ms: dict[Part, list[float]] = {}
    second_ms: dict[Part, list[float]] = {}
    for _ in range(pairs):
        for part, (median_of_first, median_of_second) in _time_one_pair(first, second).items():
            first_ms.setdefault(part, []).append(median_of_first)
            second_ms.setdefault(part, []).append(median_of_second)
    ratios = {part: paired_ratio(first_ms[part], second_ms[part]) for part in first_ms}
    return Paired(first_ms, second_ms, ratios)


def paired_ratio(first: Sequence[float], second: Sequence[float], confidence: float = _CONFIDENCE) -> Ratio:
    """Return the median of second[i] ÷ first[i] with a confidence interval by order statistics.

    The interval assumes no distribution (Conover 1999, §3.2): the true median lies between the k-th smallest and the
    k-th largest ratio unless fewer than k pairs fall to one side of it.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"got {len(first)} and {len(second)} timings, expected pairs")
    ratios = sorted(float(b / a) for a, b in zip(first, second, strict=True))
    count = len(ratios)
    coverage = [_coverage(count, k) for k in range(count // 2 + 1)]
    k = max(
        (k for k in range(1, len(coverage)) if coverage[k] >= confidence), default=min(1, len(coverage) - 1)
    )
    if k == 0:
        return Ratio(ratios[0], ratios[0], ratios[0], 0.0)
    return Ratio(float(np.median(ratios)), ratios[k - 1], ratios[-k], coverage[k])


def _coverage(count: int, k: int) -> float:
    """Return the probability that at least k of `count` pairs lie on each side of the true median."""
    fewer = sum(math.comb(count, below) for below in range(k))
    return float(1 - 2 * fewer / 2**count)


def turns(first: Stopwatch, second: Stopwatch, turn: Turn, rounds: int) -> dict[Part, tuple[float, float]]:
    """Return the medians, in milliseconds by part, of two stopwatches that take turns: A B, B A, A B …"""
    first_medians: _Medians = {}
    second_medians: _Medians = {}
    for stopwatch, medians in _alternating((first, first_medians), (second, second_medians), rounds):
        timings = stopwatch.time(turn)
        for part in PARTS:
            if milliseconds(timings, part):
                medians.setdefault(part, []).append(float(np.median(milliseconds(timings, part))))
    return {
        part: (float(np.median(first_medians[part])), float(np.median(second_medians[part])))
        for part in first_medians
    }


_Medians = dict[Part, list[float]]
_Side = tuple[Stopwatch, _Medians]


def _alternating(first: _Side, second: _Side, rounds: int) -> Iterator[_Side]:
    for number in range(rounds):
        if number % 2 == 0:
            yield from (first, second)
        else:
            yield from (second, first)


def _time_one_pair(first: Request, second: Request) -> dict[Part, tuple[float, float]]:
    with started(first) as first_stopwatch, started(second) as second_stopwatch:
        return turns(first_stopwatch, second_stopwatch, _TURN, _TURNS_PER_PAIR)
