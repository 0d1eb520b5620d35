"""Table: times models of the shapes that a study searches, with arbitrary weights, to predict the others."""

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
from jobs.prediction.latency_model import Sample, Table, amounts, fit, kinds, telling

_EACH, _MORE = 2, 8
"""So many samples for each kind of operation, and so many besides: one timing is off by several percent on a machine
that others share, and the fit takes their mean."""
_TURN = Turn(repeats=5, seconds=0.2)
_ROUNDS = 4


def make_table(materials: Materials, layouts: Sequence[Layout], cache: Path, most: int) -> Table:
    """The table for the study's target, from at most `most` new timings; nothing else may run on the machine.

    layouts: of models as the study may propose them; the most telling are timed. What was timed is kept in `cache`
    for later studies of the same original and target.
    """
    original = sources.locate(materials.model)
    whole, pool = amounts(loading.original_layout(original)), [amounts(layout) for layout in layouts]
    file = cache / "tables" / f"{_key(materials, original)}.json"
    samples = _read(file)
    wanted = kinds([whole, *pool])
    held = [sample for sample in samples if wanted >= sample.amounts.keys()]
    enough = _EACH * len(wanted) + _MORE
    # A kind that no sample does is asked for even where there are samples enough of the others.
    lacking = enough - len(held) if wanted <= kinds(sample.amounts for sample in held) else enough
    chosen = telling(pool, [sample.amounts for sample in held], max(0, min(most, lacking)))
    if chosen:
        before = next((sample.milliseconds for sample in held if sample.amounts == whole), None)
        new = _timed(materials, original, [layouts[number] for number in chosen], before)
        _write(file, [*samples, *new])
        held += new
    return fit(held)


def time_with_original(
    first: Stopwatch, materials: Materials, original: Path, layout: Layout, scratch: Path
) -> dict[str, tuple[float, float]]:
    """Milliseconds by metric of `first` and of a stand-in of this layout, timed in turn."""
    with tempfile.TemporaryDirectory(dir=scratch) as inner:
        stand_in.save_stand_in(layout, original, Path(inner) / "made")
        folder = _shipped(materials, Path(inner) / "made", scratch)
        with started(request_of(materials, original, folder)) as second:
            found = paired_timing.turns(first, second, _TURN, _ROUNDS)
    return {f"{part}_ms": both for part, both in found.items()}


def _timed(
    materials: Materials, original: Path, layouts: Sequence[Layout], before: Mapping[str, float] | None
) -> list[Sample]:
    """Samples of these layouts, each timed beside the original and told in a time in which that takes as long as
    it did `before`, or where it was never timed as it does at first: the machine's drift is none of theirs."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = loading.original_layout(original)
        stand_in.save_stand_in(whole, original, Path(scratch) / "original")
        folder = _shipped(materials, Path(scratch) / "original", Path(scratch))
        with started(request_of(materials, original, folder)) as first:
            for layout in layouts:
                found = time_with_original(first, materials, original, layout, Path(scratch))
                if before is None:
                    before = {metric: ms for metric, (ms, _) in found.items()}
                    samples.append(Sample(amounts(whole), before))
                scaled = {metric: before[metric] * ms / beside for metric, (beside, ms) in found.items()}
                samples.append(Sample(amounts(layout), scaled))
    return samples


def _shipped(materials: Materials, artifact: Path, scratch: Path) -> Path:
    name = runtimes.load(materials.target.runtime).FORMAT
    return formats.export_or_native(
        name, artifact, artifact.with_name(f"{artifact.name}-{name}"), scratch / "shared"
    )


def _key(materials: Materials, original: Path) -> str:
    target = dataclasses.replace(materials.target, price_per_hour=None)
    decides = [
        loading.digest(original), materials.task, dataclasses.astuple(target),
        dict(environment(materials.target)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _read(file: Path) -> list[Sample]:
    if not file.is_file():
        return []
    return [Sample(**record) for record in json.loads(file.read_text())]


def _write(file: Path, samples: Sequence[Sample]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
        json.dump([dataclasses.asdict(sample) for sample in samples], draft)
    os.replace(draft.name, file)
