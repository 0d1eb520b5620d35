"""Timing: one artifact in several fresh processes, until enough of them were quiet."""

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
"""Where its memory happens to lie makes one process a few percent faster than another, for as long as it lives."""
_TRIES = 7
_PATIENCE_S = 90.0
"""No process is started after so long: on a machine that stays busy, more would only take longer."""
_SPREAD = 0.10
"""The largest spread, relative to the median, of a timing that can be compared with others."""
_OTHERS = 0.10
"""The largest share of the processors' time that other processes may have taken."""
_SLOWED = 0.10
"""By how much the processors' frequency may have fallen below the highest that was seen."""


@dataclass(frozen=True)
class Timed:
    """What came of each process. tries: all of them, in order."""

    tries: tuple[Timings, ...]

    def chosen(self, part: Part) -> Sequence[Timings]:
        """The processes that count for this part: the first quiet ones, or where too few were quiet, those of
        the least spread."""
        quiet = [one for one in self.tries if not noisy(one, part)]
        if len(quiet) >= _PROCESSES:
            return quiet[:_PROCESSES]
        return sorted(self.tries, key=lambda one: (noisy(one, part), spread(one, part)))[:_PROCESSES]

    def reliable(self, part: Part) -> bool:
        """Whether enough processes were quiet, and agree."""
        chosen = self.chosen(part)
        medians = [median_ms(one, part) for one in chosen]
        agree = max(medians) - min(medians) <= 2 * _SPREAD * float(np.median(medians))
        return len(chosen) == _PROCESSES and agree and not any(noisy(one, part) for one in chosen)


def request_of(materials: Materials, original: Path, folder: Path) -> Request:
    """The request to time what lies in `folder`, in the target's format, on the target."""
    target = materials.target
    return Request(
        str(folder), target.runtime, target.threads, target.prompt_tokens, materials.new_tokens,
        tokenizers.vocabulary_size(original),
    )  # fmt: skip


def time_quietly(once: Callable[[], Timings], clock: Callable[[], float] = time.monotonic) -> Timed:
    """Let `once` time the artifact in one new process after the other, until enough were quiet in every part."""
    began = clock()
    tries = [once()]
    while len(tries) < _TRIES and clock() - began < _PATIENCE_S:
        parts = [part for part in PARTS if milliseconds(tries[0], part)]
        if all(sum(not noisy(one, part) for one in tries) >= _PROCESSES for part in parts):
            break
        tries.append(once())
    return Timed(tuple(tries))


def noisy(timings: Timings, part: Part) -> bool:
    """Whether something disturbed this part: its timings differ, others computed, or the processors slowed down."""
    slowed = bool(timings.mhz) and min(timings.mhz) < (1 - _SLOWED) * max(timings.mhz)
    disturbed = timings.others > _OTHERS or slowed or timings.throttled > 0
    return disturbed or spread(timings, part) > _SPREAD * median_ms(timings, part)


def spread(timings: Timings, part: Part) -> float:
    """Half of the interquartile range. Single outliers, which every machine has, do not move it."""
    low, high = np.percentile(milliseconds(timings, part), [25, 75])
    return float(high - low) / 2


def median_ms(timings: Timings, part: Part) -> float:
    return float(np.median(milliseconds(timings, part)))


def milliseconds(timings: Timings, part: Part) -> list[float]:
    return timings.prefill_ms if part == "prefill" else timings.decode_ms
