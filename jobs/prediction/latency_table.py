"""Make the table of operations: time models of a study's shapes, with arbitrary weights, and fit it to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs import formats, runtimes
from jobs.materials import Materials
from jobs.measure import environment
from jobs.measurement import paired_timing
from jobs.measurement.stopwatch import Stopwatch, Turn, started
from jobs.measurement.timing import request_of
from jobs.models import loading, sources, stand_in
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Sample, Table, amounts, fit, kinds, most_informative

_SAMPLES_PER_KIND, _EXTRA_SAMPLES = 2, 8
"""Numbers of samples. One timing is wrong by several percent on a shared machine, and the fit averages them."""
_TURN = Turn(repeats=5, seconds=0.2)
_ROUNDS = 4


def make_table(materials: Materials, layouts: Sequence[Layout], cache: Path, max_timings: int) -> Table:
    """Return the table for the study's target, from at most `max_timings` new timings on an otherwise idle machine.

    layouts: of models that the study may propose; the most informative ones are timed. `cache` keeps the samples for
    later studies of the same original and target.
    """
    original = sources.locate(materials.model)
    original_amounts = amounts(loading.original_layout(original))
    pool = [amounts(layout) for layout in layouts]
    file = cache / "tables" / f"{_key(materials, original)}.json"
    samples = _read(file)
    searched_kinds = kinds([original_amounts, *pool])
    usable = [sample for sample in samples if searched_kinds >= sample.amounts.keys()]
    missing = _SAMPLES_PER_KIND * len(searched_kinds) + _EXTRA_SAMPLES
    # If a kind has no sample, samples of the other kinds do not reduce the number of new timings.
    if searched_kinds <= kinds(sample.amounts for sample in usable):
        missing -= len(usable)
    timed = [sample.amounts for sample in usable]
    chosen = most_informative(pool, timed, max(0, min(max_timings, missing)))
    if chosen:
        reference = next(
            (sample.milliseconds for sample in usable if sample.amounts == original_amounts), None
        )
        new = _timed(materials, original, [layouts[number] for number in chosen], reference)
        _write(file, [*samples, *new])
        usable += new
    return fit(usable)


def time_with_original(
    first: Stopwatch, materials: Materials, original: Path, layout: Layout, scratch: Path
) -> dict[str, tuple[float, float]]:
    """Return the milliseconds by metric of `first` and of a stand-in of this layout, timed in turns."""
    with tempfile.TemporaryDirectory(dir=scratch) as inner:
        stand_in.save_stand_in(layout, original, Path(inner) / "made")
        folder = _shipped(materials, Path(inner) / "made", scratch)
        with started(request_of(materials, original, folder)) as second:
            medians = paired_timing.turns(first, second, _TURN, _ROUNDS)
    return {f"{part}_ms": pair for part, pair in medians.items()}


def _timed(
    materials: Materials, original: Path, layouts: Sequence[Layout], reference: Mapping[str, float] | None
) -> list[Sample]:
    """Return samples of these layouts, each timed in turns with the original.

    Times are scaled so that the original takes the `reference` times, or those of its first timing if that is None. So
    a drift of the machine's speed cancels.
    """
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as scratch:
        original_layout = loading.original_layout(original)
        stand_in.save_stand_in(original_layout, original, Path(scratch) / "original")
        folder = _shipped(materials, Path(scratch) / "original", Path(scratch))
        with started(request_of(materials, original, folder)) as first:
            for layout in layouts:
                pairs = time_with_original(first, materials, original, layout, Path(scratch))
                if reference is None:
                    reference = {metric: original_ms for metric, (original_ms, _) in pairs.items()}
                    samples.append(Sample(amounts(original_layout), reference))
                scaled = {
                    metric: reference[metric] * ms / original_ms
                    for metric, (original_ms, ms) in pairs.items()
                }
                samples.append(Sample(amounts(layout), scaled))
    return samples


def _shipped(materials: Materials, artifact: Path, scratch: Path) -> Path:
    name = runtimes.load(materials.target.runtime).FORMAT
    return formats.export_or_native(
        name, artifact, artifact.with_name(f"{artifact.name}-{name}"), scratch / "shared"
    )


def _key(materials: Materials, original: Path) -> str:
    target = dataclasses.replace(materials.target, price_per_hour=None)
    parts = [
        loading.digest(original), materials.task, dataclasses.astuple(target),
        dict(environment(materials.target)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(file: Path) -> list[Sample]:
    if not file.is_file():
        return []
    return [Sample(**record) for record in json.loads(file.read_text())]


def _write(file: Path, samples: Sequence[Sample]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
        json.dump([dataclasses.asdict(sample) for sample in samples], draft)
    os.replace(draft.name, file)
