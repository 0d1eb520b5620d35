"""A table of real compressions: every combination of a small joint grid on MiniLM-L6, made and measured.

Run from the repository's root: python -m benchmarks.sweep [--quick] [--out benchmarks/data/minilm_sweep.json]
351 models: blocks dropped × neurons pruned × rank × rounding, one step after the other, by the product's own jobs on
one thread; 15 minutes or so. What combinations share is made once and kept only while it is needed. The table is one
of benchmarks.search's problems. Needs what benchmarks.techniques needs.

Of each row, size_bytes and agreement (the mean cosine between its sentence vectors and the original's) are those of
the job's meters, seconds what making its last step and measuring it took on the machine that made the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.techniques import texts
from jobs import data, techniques
from jobs.job import Failure, Job
from jobs.knobs import Value
from jobs.materials import Materials
from jobs.measure import environment
from jobs.models import loading, sources
from jobs.recipe import Origin, Recipe
from jobs.run import JobDirs, JobOutput, WorkRequest, attempt

OUT = Path(__file__).parent / "data" / "minilm_sweep.json"
METERS = ("size", "agreement")
SKIP = "skip"
Options = Mapping[str, tuple[Value, ...]]
Stages = Mapping[str, Mapping[str, Options]]
# Each stage may be skipped as well.
_ROUNDING: Options = {"bits": (3, 4, 8), "embedding_bits": (8, 4)}
STAGES: Stages = {
    "depth": {"drop_layers": {"count": (1, 2)}},
    "width": {"prune_ffn": {"ratio": (0.25, 0.5)}},
    "rank": {"svd_llm": {"keep": (0.9, 0.8)}},
    "bits": {"rtn": _ROUNDING, "gptq": _ROUNDING},
}
QUICK: Stages = {
    "width": {"prune_ffn": {"ratio": (0.5,)}},
    "bits": {"rtn": {"bits": (4,), "embedding_bits": (8, 4)}},
}


@dataclass(frozen=True)
class Row:
    choices: Mapping[str, Value]
    metrics: Mapping[str, float]


def space(stages: Stages) -> dict[str, Any]:
    """The knobs of a grid, as benchmarks.search_problems reads them."""
    found: dict[str, Any] = {}
    for stage, named in stages.items():
        found[stage] = {"choices": [SKIP, *named]}
        for name, options in named.items():
            found |= {f"{stage}.{name}.{knob}": {"choices": list(values)} for knob, values in options.items()}
    return found


def sweep(root: Recipe, materials: Materials, stages: Stages) -> Iterator[Row]:
    """Every combination, depth first: only the models that the one at hand goes through are kept."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _from(root, {}, materials, list(stages.items()), None, Path(folder))


def _from(
    recipe: Recipe,
    chosen: Mapping[str, Value],
    materials: Materials,
    later: Sequence[tuple[str, Mapping[str, Options]]],
    parent: Path | None,
    folder: Path,
) -> Iterator[Row]:
    """The recipe itself, made in `folder` of its parent's artifact, and what later stages make of it."""
    made, cache = folder / "made", folder / "cache"
    dirs = JobDirs(made, cache if parent is None else parent / "cache")
    request = WorkRequest(
        Job(recipe, METERS, "sweep"), materials, dirs, parent=None if parent is None else parent / "made"
    )
    outcome = attempt(request, lambda share, activity: None)
    if isinstance(outcome, Failure):
        raise RuntimeError(f"{recipe} failed: {outcome.message}\n{outcome.traceback}")
    assert isinstance(outcome, JobOutput)  # this process is the only rank
    found = outcome.measurement
    seconds = round(outcome.seconds + found.seconds, 3)
    skipped = {**chosen, **{stage: SKIP for stage, _ in later}}
    yield Row(skipped, {**found.metrics, "seconds": seconds})
    for at, (stage, named) in enumerate(later):
        before = {**chosen, **{skipped: SKIP for skipped, _ in later[:at]}}
        for name, values in _combinations(named):
            with tempfile.TemporaryDirectory(dir=folder) as below:
                yield from _from(
                    recipe.then(techniques.load(name).of(values)),
                    {**before, stage: name, **{f"{stage}.{name}.{knob}": v for knob, v in values.items()}},
                    materials, later[at + 1 :], folder, Path(below),
                )  # fmt: skip


def _combinations(named: Mapping[str, Options]) -> Iterator[tuple[str, dict[str, Value]]]:
    for name, options in named.items():
        for values in itertools.product(*options.values()):
            yield name, dict(zip(options, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="six models, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stages = QUICK if given.quick else STAGES
    materials = texts(True, quick=True)
    original = sources.locate(materials.model)
    assert materials.calibration is not None
    root = Recipe(Origin(loading.digest(original), data.digest(materials.calibration), seed=0))
    rows, began = [], time.perf_counter()
    for row in sweep(root, materials, stages):
        rows.append([row.choices, row.metrics])
        spent = time.perf_counter() - began
        print(f"{len(rows)} models, {spent:.0f} s: {row.metrics}", file=sys.stderr, flush=True)
    record = {
        "about": "made by benchmarks/sweep.py",
        "environment": dict(environment(materials.target)),
        "space": space(stages),
        "objectives": {"size_bytes": {"goal": "min"}, "agreement": {"goal": "max"}},
        "known": ["size_bytes"],
        "rows": rows,
    }
    beside = given.out.with_suffix(".tmp")
    beside.parent.mkdir(exist_ok=True)
    beside.write_text("{\n" + ",\n".join(_lines(record)) + "\n}\n")
    os.replace(beside, given.out)


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key, and for each row."""
    for key, value in record.items():
        shown = json.dumps(value) if key != "rows" else "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        yield f"{json.dumps(key)}: {shown}"


if __name__ == "__main__":
    main()
