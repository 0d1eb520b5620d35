"""Compare: two exports against each other, timed in turns and judged on the same items."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs import measure, meters
from jobs.materials import Materials
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import MeasuredModel
from jobs.measurement.paired_timing import time_pair
from jobs.measurement.stopwatch import Request
from jobs.measurement.timing import request_of
from jobs.models import tokenizers
from orchestrator.publishing.verify import original_of, recorded
from orchestrator.study.results import paired


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of both. against: the second's, less the first's, or for times divided by it; low, high: between
    which bounds that lies, for times so surely as `confidence` says, else within two standard errors."""

    metric: str
    first: float
    second: float
    against: float
    low: float
    high: float
    confidence: float = 0.95


def compare(first: Path, second: Path, pairs: int) -> list[ComparedMetric]:
    """Size and quality of both, measured now on the texts that the first was, and their times, in so many pairs.

    Raises as `verify` does, and ValueError where their tasks or tokenizers differ.
    """
    record, known = recorded(first)
    another, other = recorded(second)
    if known.task != other.task:
        raise ValueError(f"{first} is for {known.task}, {second} for {other.task}: they cannot be compared")
    if tokenizers.tokenizer_digest(first) != tokenizers.tokenizer_digest(second):
        raise ValueError(f"{first} and {second} have other tokenizers: their items are not the same")
    # The same texts, threads and prompts for both, each in the runtime of its form.
    other = dataclasses.replace(known, target=dataclasses.replace(known.target, runtime=other.target.runtime))
    both = {
        meters.meter_of(metric, known.task) for metric in record["metrics"].keys() & another["metrics"].keys()
    }
    asked = sorted(name for name in both if not meters.load(name).exclusive)
    quality = _quality(_measured(first, known, asked), _measured(second, other, asked))
    return [*quality, *_times(request_of(known, first, first), request_of(other, second, second), pairs)]


def _measured(folder: Path, materials: Materials, asked: list[str]) -> Measurement:
    with tempfile.TemporaryDirectory() as scratch:
        subject = MeasuredModel(
            folder, original_of(folder, materials, {*asked}), materials, workdir=Path(scratch)
        )
        return measure.measure(asked, subject)


def _quality(first: Measurement, second: Measurement) -> list[ComparedMetric]:
    found = []
    for metric, value in first.metrics.items():
        apart = paired(second, first, metric)
        against = second.metrics[metric] - value
        within = 2 * apart.error if apart is not None else 0.0
        found.append(
            ComparedMetric(metric, value, second.metrics[metric], against, against - within, against + within)
        )
    return found


def _times(first: Request, second: Request, pairs: int) -> list[ComparedMetric]:
    timed = time_pair(first, second, pairs)
    return [
        ComparedMetric(
            f"{part}_ms", statistics.median(timed.first_ms[part]), statistics.median(timed.second_ms[part]),
            ratio.ratio, ratio.low, ratio.high, ratio.confidence,
        )
        for part, ratio in timed.ratios.items()
    ]  # fmt: skip
