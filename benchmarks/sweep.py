"""Make a table of real compressions: every combination of a small joint grid on MiniLM-L6, measured.

Run from the repository's root: python -m benchmarks.sweep [--quick] [--out benchmarks/data/minilm_sweep.json]
351 models: blocks dropped × neurons pruned × rank × rounding, one step after the other, by the product's own jobs on
one thread, in about 15 minutes. A prefix that combinations share is made once and kept only while it is needed. The
table is a problem of benchmarks.search. It needs the packages and data of benchmarks.techniques.

In each row, size_bytes and agreement (the mean cosine between its sentence vectors and the original's) come from the
job's meters; seconds is the time of its last step and of its measurement, on the machine that made the table.
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
# Each stage may also be skipped.
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
    """Return the knobs of a grid, in the format of benchmarks.search_problems."""
    knobs: dict[str, Any] = {}
    for stage, named in stages.items():
        knobs[stage] = {"choices": [SKIP, *named]}
        for name, options in named.items():
            for knob, values in options.items():
                knobs[f"{stage}.{name}.{knob}"] = {"choices": list(values)}
    return knobs


def sweep(root: Recipe, materials: Materials, stages: Stages) -> Iterator[Row]:
    """Yield every combination, depth first. Only the prefixes of the current combination are kept."""
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
    """Make the recipe in `folder` from its parent's artifact; yield its row, then those of later stages."""
    dirs, parent_artifact = JobDirs(folder / "made", folder / "cache"), None
    if parent is not None:
        dirs, parent_artifact = JobDirs(folder / "made", parent / "cache"), parent / "made"
    request = WorkRequest(Job(recipe, METERS, "sweep"), materials, dirs, parent=parent_artifact)
    outcome = attempt(request, lambda share, activity: None)
    if isinstance(outcome, Failure):
        raise RuntimeError(f"{recipe} failed: {outcome.message}\n{outcome.traceback}")
    assert isinstance(outcome, JobOutput)  # this process is the only rank
    measurement = outcome.measurement
    seconds = round(outcome.seconds + measurement.seconds, 3)
    skipped = {**chosen, **{stage: SKIP for stage, _ in later}}
    yield Row(skipped, {**measurement.metrics, "seconds": seconds})
    for index, (stage, named) in enumerate(later):
        earlier = {**chosen, **{skipped: SKIP for skipped, _ in later[:index]}}
        for name, values in _combinations(named):
            with tempfile.TemporaryDirectory(dir=folder) as child_folder:
                options = {f"{stage}.{name}.{knob}": value for knob, value in values.items()}
                yield from _from(
                    recipe.then(techniques.load(name).of(values)), {**earlier, stage: name, **options},
                    materials, later[index + 1 :], folder, Path(child_folder),
                )  # fmt: skip


def _combinations(named: Mapping[str, Options]) -> Iterator[tuple[str, dict[str, Value]]]:
    for name, options in named.items():
        for values in itertools.product(*options.values()):
            yield name, dict(zip(options, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="six models, to try the benchmark")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = STAGES
    if options.quick:
        stages = QUICK
    materials = texts(True, quick=True)
    original = sources.locate(materials.model)
    assert materials.calibration is not None
    root = Recipe(Origin(loading.digest(original), data.digest(materials.calibration), seed=0))
    rows, start = [], time.perf_counter()
    for row in sweep(root, materials, stages):
        rows.append([row.choices, row.metrics])
        seconds = time.perf_counter() - start
        print(f"{len(rows)} models, {seconds:.0f} s: {row.metrics}", file=sys.stderr, flush=True)
    record = {
        "about": "made by benchmarks/sweep.py",
        "environment": dict(environment(materials.target)),
        "space": space(stages),
        "objectives": {"size_bytes": {"goal": "min"}, "agreement": {"goal": "max"}},
        "known": ["size_bytes"],
        "rows": rows,
    }
    draft = options.out.with_suffix(".tmp")
    draft.parent.mkdir(exist_ok=True)
    draft.write_text("{\n" + ",\n".join(_lines(record)) + "\n}\n")
    os.replace(draft, options.out)


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a file: one for each key, and one for each row."""
    for key, value in record.items():
        text = json.dumps(value)
        if key == "rows":
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        yield f"{json.dumps(key)}: {text}"


if __name__ == "__main__":
    main()
