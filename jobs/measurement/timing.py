"""Time one artifact in several fresh processes, until enough of them were quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jobs.materials import Materials
from jobs.measurement.stopwatch import Request, Timings
from jobs.models import tokenizers

Part = Literal["prefill", "decode"]
PARTS: tuple[Part, ...] = ("prefill", "decode")

_PROCESSES = 3
"""Number of quiet processes. Their memory placement makes processes differ by a few percent, as long as they live."""
_MAX_PROCESSES = 7
"""More processes than this rarely made a noisy machine quiet."""
_PATIENCE_S = 90.0
"""Seconds after which no process is started: on a busy machine, more processes only take longer."""
_MAX_SPREAD = 0.10
"""Maximum spread relative to the median of a comparable timing."""
_MAX_LOAD_SHARE = 0.10
"""Maximum share of the processors' time that other processes may take."""
_MAX_SLOWDOWN = 0.10
"""Maximum relative drop of the processors' frequency below the highest observed one."""


@dataclass(frozen=True)
class RepeatedTimings:
    """The timings of each process, in order."""

    tries: tuple[Timings, ...]

    def chosen(self, part: Part) -> Sequence[Timings]:
        """Return the processes that count for this part: the first quiet ones, or if too few were quiet, those with
        the smallest spread."""
        quiet = [timings for timings in self.tries if not noisy(timings, part)]
        if len(quiet) >= _PROCESSES:
            return quiet[:_PROCESSES]
        return sorted(self.tries, key=lambda timings: (noisy(timings, part), spread(timings, part)))[
            :_PROCESSES
        ]

    def reliable(self, part: Part) -> bool:
        """Return whether enough processes were quiet and agree."""
        chosen = self.chosen(part)
        medians = [median_ms(timings, part) for timings in chosen]
        agree = max(medians) - min(medians) <= 2 * _MAX_SPREAD * float(np.median(medians))
        return len(chosen) == _PROCESSES and agree and not any(noisy(timings, part) for timings in chosen)


def request_of(materials: Materials, original: Path, folder: Path) -> Request:
    """Return the request to time the model in `folder`, in the target's format, on the target."""
    target = materials.target
    return Request(
        str(folder), target.runtime, target.threads, target.prompt_tokens, materials.new_tokens,
        tokenizers.vocabulary_size(original),
    )  # fmt: skip


def time_quietly(
    time_once: Callable[[], Timings], clock: Callable[[], float] = time.monotonic
) -> RepeatedTimings:
    """Time the artifact in one new process after another until enough of them were quiet in every part."""
    began = clock()
    tries = [time_once()]
    while len(tries) < _MAX_PROCESSES and clock() - began < _PATIENCE_S:
        parts = [part for part in PARTS if milliseconds(tries[0], part)]
        if all(_quiet_count(tries, part) >= _PROCESSES for part in parts):
            break
        tries.append(time_once())
    return RepeatedTimings(tuple(tries))


def _quiet_count(tries: Sequence[Timings], part: Part) -> int:
    return sum(not noisy(timings, part) for timings in tries)


def noisy(timings: Timings, part: Part) -> bool:
    """Return whether this part was disturbed: timings differ, other processes ran, or the processors slowed down."""
    slowed = bool(timings.mhz) and min(timings.mhz) < (1 - _MAX_SLOWDOWN) * max(timings.mhz)
    disturbed = timings.load_share > _MAX_LOAD_SHARE or slowed or timings.throttled > 0
    return disturbed or spread(timings, part) > _MAX_SPREAD * median_ms(timings, part)


def spread(timings: Timings, part: Part) -> float:
    """Return half of the interquartile range, which single outliers do not change."""
    low, high = np.percentile(milliseconds(timings, part), [25, 75])
    return float(high - low) / 2


def median_ms(timings: Timings, part: Part) -> float:
    """Return the median of a part in milliseconds."""
    return float(np.median(milliseconds(timings, part)))


def milliseconds(timings: Timings, part: Part) -> list[float]:
    """Return the single timings of a part."""
    if part == "prefill":
        return timings.prefill_ms
    return timings.decode_ms
