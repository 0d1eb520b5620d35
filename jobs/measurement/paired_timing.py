"""Pairing: two artifacts timed against each other, turn by turn, so that a machine that drifts does so for both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from jobs.measurement.stopwatch import Request, Stopwatch, Turn, started
from jobs.measurement.timing import PARTS, Part, milliseconds

_PAIRS = 6
"""The fewest of which the smallest and the largest ratio enclose the true median in 19 of 20 cases."""
_TURNS = 4
_TURN = Turn(repeats=5, seconds=0.25)
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second takes as the first: the median of the pairs' ratios, and between which
    bounds the true median lies. confidence: how surely, at most what was asked for where there were too few pairs."""

    ratio: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Paired:
    """Milliseconds by part, one value a pair, and their ratios (second to first)."""

    first_ms: dict[Part, list[float]]
    second_ms: dict[Part, list[float]]
    ratios: dict[Part, Ratio]


def time_pair(first: Request, second: Request, pairs: int = _PAIRS) -> Paired:
    """Time two artifacts against each other. Nothing else should run on the machine.

    A pair is two new processes that take turns, A B B A A B B A: only one computes at a time, and what the machine
    does to one it does to the other. New processes for every pair, because where its memory happens to lie makes
    a process faster or slower for as long as it lives; so the pairs are independent, and their spread is honest.
    """
    firsts: dict[Part, list[float]] = {}
    seconds: dict[Part, list[float]] = {}
    for _ in range(pairs):
        for part, (one, other) in _one_pair(first, second).items():
            firsts.setdefault(part, []).append(one)
            seconds.setdefault(part, []).append(other)
    return Paired(firsts, seconds, {part: paired_ratio(firsts[part], seconds[part]) for part in firsts})


def paired_ratio(first: Sequence[float], second: Sequence[float], confidence: float = _CONFIDENCE) -> Ratio:
    """The median of second[i] ÷ first[i] and its confidence interval by order statistics, which assumes nothing
    of how timings are distributed (Conover 1999, §3.2): between the k-th smallest and the k-th largest ratio lies
    the true median unless fewer than k pairs fell to one side of it."""
    if len(first) != len(second) or not first:
        raise ValueError(f"got {len(first)} and {len(second)} timings, expected pairs")
    ratios = sorted(float(b / a) for a, b in zip(first, second, strict=True))
    count = len(ratios)
    # How likely fewer than k of the pairs are below the true median, on each side one half of them.
    sure = [
        1 - 2 * sum(math.comb(count, below) for below in range(k)) / 2**count for k in range(count // 2 + 1)
    ]
    k = max((k for k in range(1, len(sure)) if sure[k] >= confidence), default=min(1, len(sure) - 1))
    if k == 0:
        return Ratio(ratios[0], ratios[0], ratios[0], 0.0)
    return Ratio(float(np.median(ratios)), ratios[k - 1], ratios[-k], sure[k])


def turns(first: Stopwatch, second: Stopwatch, turn: Turn, rounds: int) -> dict[Part, tuple[float, float]]:
    """The medians, in milliseconds by part, of two stopwatches that time in turn: A B, B A, A B …"""
    told: tuple[dict[Part, list[float]], dict[Part, list[float]]] = ({}, {})
    for stopwatch, into in _alternating(first, second, told, rounds):
        timings = stopwatch.time(turn)
        for part in PARTS:
            if milliseconds(timings, part):
                into.setdefault(part, []).append(float(np.median(milliseconds(timings, part))))
    return {part: (float(np.median(told[0][part])), float(np.median(told[1][part]))) for part in told[0]}


Told = dict[Part, list[float]]


def _alternating(
    first: Stopwatch, second: Stopwatch, told: tuple[Told, Told], rounds: int
) -> Iterator[tuple[Stopwatch, Told]]:
    sides = ((first, told[0]), (second, told[1]))
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def _one_pair(first: Request, second: Request) -> dict[Part, tuple[float, float]]:
    with ExitStack() as both:
        one, other = both.enter_context(started(first)), both.enter_context(started(second))
        return turns(one, other, _TURN, _TURNS)
