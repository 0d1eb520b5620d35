"""Compare two exports: quality on the same evaluation items, times measured in alternation."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs import measure, meters
from jobs.materials import Materials
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel
from jobs.measurement.paired_timing import time_pair
from jobs.measurement.stopwatch import Request
from jobs.measurement.timing import request_of
from jobs.models import tokenizers
from orchestrator.publishing.verify import original_of, recorded
from orchestrator.study.results import paired


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of both exports."""

    metric: str
    first: float
    second: float
    against: float
    """The second value minus the first; for times, the ratio of the second to the first."""
    low: float
    """The lower bound of `against`: for times of its confidence interval, otherwise two standard errors below."""
    high: float
    """The upper bound of `against`."""
    confidence: float = 0.95
    """The confidence of the interval of times."""


def compare(first: Path, second: Path, pairs: int) -> list[ComparedMetric]:
    """Measure size and quality of both exports on the texts of the first, and their times in this number of pairs.

    Raises the errors of `verify`, and ValueError if their tasks or tokenizers differ.
    """
    first_record, materials = recorded(first)
    second_record, second_materials = recorded(second)
    if materials.task != second_materials.task:
        raise ValueError(
            f"{first} is for {materials.task}, {second} for {second_materials.task}: they cannot be compared"
        )
    if tokenizers.tokenizer_digest(first) != tokenizers.tokenizer_digest(second):
        raise ValueError(f"{first} and {second} have different tokenizers, so their evaluation items differ")
    # The same texts, threads and prompts for both, each in the runtime of its format.
    target = dataclasses.replace(materials.target, runtime=second_materials.target.runtime)
    second_materials = dataclasses.replace(materials, target=target)
    common_metrics = first_record["metrics"].keys() & second_record["metrics"].keys()
    names = {meters.meter_of(metric, materials.task) for metric in common_metrics}
    quality_meters = sorted(name for name in names if not meters.load(name).exclusive)
    quality = _quality(
        _measured(first, materials, quality_meters), _measured(second, second_materials, quality_meters)
    )
    requests = request_of(materials, first, first), request_of(second_materials, second, second)
    return [*quality, *_times(*requests, pairs)]


def _measured(folder: Path, materials: Materials, names: list[str]) -> Measurement:
    with tempfile.TemporaryDirectory() as scratch:
        original = original_of(folder, materials, {*names})
        subject = ShippedModel(folder, original, materials, workdir=Path(scratch))
        return measure.measure(names, subject)


def _quality(first: Measurement, second: Measurement) -> list[ComparedMetric]:
    rows = []
    for metric, value in first.metrics.items():
        against = second.metrics[metric] - value
        margin = 0.0
        difference = paired(second, first, metric)
        if difference is not None:
            margin = 2 * difference.error
        rows.append(
            ComparedMetric(metric, value, second.metrics[metric], against, against - margin, against + margin)
        )
    return rows


def _times(first: Request, second: Request, pairs: int) -> list[ComparedMetric]:
    timed = time_pair(first, second, pairs)
    return [
        ComparedMetric(
            f"{part}_ms", statistics.median(timed.first_ms[part]), statistics.median(timed.second_ms[part]),
            ratio.ratio, ratio.low, ratio.high, ratio.confidence,
        )
        for part, ratio in timed.ratios.items()
    ]  # fmt: skip
