"""One study, the same minutes on the same machine: slimfront beside Ray Tune, and beside Olive where there is one.

python -m benchmarks.front [--minutes M] [--seeds N] [--model FOLDER] [--olive PYTHON] [--json FILE]

The model is a classifier of Brown's sorts of prose (benchmarks/genres.py; made in FOLDER where it is not there), the
space that of examples/minilm.yaml, the objectives its size (min) and its accuracy (max): nothing is timed, so that
nobody has to run alone. Needs what benchmarks.techniques needs, and ray[tune].

    slimfront   `slimfront search` on a new, empty store, without MLflow
    ray tune    OptunaSearch with its default sampler and warm actors; a trial makes its recipe by the same jobs and
                meters (benchmarks/peer_ray_tune.py); checked first: one recipe must come out the same by both
    olive       a search over its own passes, measured on the same texts (benchmarks/peer_olive.py)

Each has two slots of one thread (Olive, which tries one model at a time, two threads) and counts from the start of its
process, libraries and all; what has not ended when the time is over counts nothing. The order of contestants turns with
the seed. Hypervolumes are of all that a contestant measured by then, as shares of what a model would have that is as
accurate as the original and has no bytes; they are bounded by the original's size in bf16, and by the accuracy of
always naming the most frequent sort.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks import genres
from benchmarks.peer_ray_tune import Steps, Task
from cluster.on_ray.executor import one_thread
from jobs.job import Job, Success
from jobs.knobs import Value
from jobs.measure import environment
from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe
from orchestrator.config.load import load
from orchestrator.pareto.front import Objective, hypervolume, nondominated
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.study.events import AttemptEnded, CandidateProposed
from orchestrator.worker.work import WorkerContext, work

SLOTS = 2
QUARTERS = (0.25, 0.5, 0.75, 1.0)
TEXTS_EACH = 4
"""Passages of each of 93 documents that accuracy is measured on."""
GRACE_SECONDS = 60.0
"""So long a contestant may take to end when its time is over."""
OBJECTIVES = (Objective("size_bytes", "min"), Objective("accuracy", "max"))
FIXED: Mapping[str, Value] = {
    "depth": "drop_layers", "depth.drop_layers.count": 1, "width": "prune_ffn", "width.prune_ffn.ratio": 0.25,
    "rank": "svd_llm", "rank.svd_llm.keep": 0.9, "recover": "distill", "bits": "gptq", "bits.gptq.bits": 4,
    "bits.gptq.embedding_bits": 8,
}  # fmt: skip
"""The choices that both routes must make the same model of."""


@dataclass(frozen=True)
class Point:
    """A candidate that was measured. seconds: after the contestant was started."""

    seconds: float
    recipe: str
    size_bytes: float
    accuracy: float


@dataclass(frozen=True)
class Bounds:
    """The original, and the accuracy of naming the most frequent label."""

    size_bytes: float
    accuracy: float
    guessing: float

    def share(self, points: Sequence[Point]) -> float:
        losses = np.array([(one.size_bytes, -one.accuracy) for one in points])
        volume = hypervolume(losses, np.array([self.size_bytes, -self.guessing]))
        return volume / (self.size_bytes * (self.accuracy - self.guessing))


@dataclass(frozen=True)
class Match:
    """What a contestant is given. study: its file; folder: its own, empty but for that."""

    study: Path
    folder: Path
    seed: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """What a contestant measured with one seed, in the order of time."""

    contestant: str
    seed: int
    points: tuple[Point, ...]

    def until(self, seconds: float) -> list[Point]:
        return [point for point in self.points if point.seconds <= seconds]


Contestant = Callable[[Match], list[Point]]


def slimfront(match: Match) -> list[Point]:
    prepared = prepare(load(match.study))
    began = time.time()
    run_until(
        began + match.seconds, [sys.executable, "-m", "orchestrator", "search", str(match.study)], match
    )
    ledger = Ledger(prepared.folder.ledger, read_only=True)
    events = list(ledger.events())
    ledger.close()
    recipes: dict[str, Recipe] = {}
    found = []
    for at, event in events:
        if isinstance(event, CandidateProposed):
            recipes[_measuring(prepared, event.recipe).id] = event.recipe
        elif (
            isinstance(event, AttemptEnded) and event.job_id in recipes and isinstance(event.outcome, Success)
        ):
            metrics = event.outcome.measurement.metrics
            recipe = str(recipes[event.job_id])
            found.append(Point(at - began, recipe, metrics["size_bytes"], metrics["accuracy"]))
    return found


def ray_tune(match: Match) -> list[Point]:
    began, out = time.time(), match.folder / "trials.jsonl"
    until = began + match.seconds
    module = [sys.executable, "-m", "benchmarks.peer_ray_tune"]
    # It is told when to end, and ends by itself.
    run_until(
        until + GRACE_SECONDS, [*module, str(match.study), str(match.seed), str(until), str(out)], match
    )
    return recorded(out, began)


def olive(python: str, match: Match) -> list[Point]:
    began, out = time.time(), match.folder / "models.jsonl"
    study = yaml.safe_load(match.study.read_text())
    script = str(Path(__file__).with_name("peer_olive.py"))
    given = [study["model"], study["data"]["labelled"], str(match.seed), str(SLOTS), str(out)]
    run_until(began + match.seconds, [python, script, *given], match)
    return recorded(out, began)


def recorded(file: Path, began: float) -> list[Point]:
    """The lines that a peer wrote, each when a candidate was measured; the last may be cut off."""
    found = []
    for line in file.read_text().splitlines(keepends=True) if file.is_file() else ():
        if line.endswith("\n"):
            one = json.loads(line)
            found.append(Point(one["ended"] - began, one["recipe"], one["size_bytes"], one["accuracy"]))
    return found


def run_until(deadline: float, command: Sequence[str], match: Match) -> None:
    """Run a contestant, and end it when its time is over. RuntimeError where it failed before."""
    log = match.folder / "log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **one_thread()}
        )
        try:
            process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            return
        finally:
            _end(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_study(folder: Path, model: Path, texts: Path, seed: int) -> Path:
    """The example's study with this model and the texts of a folder, and as many candidates as there is time for."""
    study = yaml.safe_load(Path("examples/minilm.yaml").read_text())
    study |= {
        "name": "front", "model": str(model), "task": "classification", "store": str(folder / "runs"),
        "objectives": {objective.metric: {"goal": objective.goal} for objective in OBJECTIVES},
        "search": {"candidates": 1_000_000, "seed": seed},
        "tracking": {"uri": "none"}, "cluster": {"slots": SLOTS}, "target": {"threads": 1},
        "data": {
            "calibration": {"path": str(texts / "calibration.jsonl"), "samples": 32, "tokens": 128},
            "train": {"path": str(texts / "train.jsonl"), "samples": 256, "tokens": 128},
            "labelled": str(texts / "items.jsonl"),
        },
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def _measuring(prepared: PreparedStudy, recipe: Recipe) -> Job:
    return Job(recipe, prepared.plan.meters, prepared.plan.materials_digest)


def measured_by_us(prepared: PreparedStudy, recipe: Recipe, folder: Path) -> Measurement:
    place = WorkerContext(
        prepared.materials, str(folder / "store"), folder / "scratch", folder / "statistics"
    )
    *before, last = recipe.lineage()
    for prefix in before:
        work(Job(prefix, (), ""), place)
    outcome = work(_measuring(prepared, last), place)
    if not isinstance(outcome, Success):
        raise RuntimeError(f"{last} failed: {outcome.message}")
    return outcome.measurement


def bounds(prepared: PreparedStudy, passages: Sequence[genres.Passage]) -> Bounds:
    """What volumes are bounded by. RuntimeError where a recipe does not come out the same by both routes."""
    original = prepared.plan.original
    recipe = prepared.space.recipe(original.origin, FIXED)
    print(f"making {recipe} by both routes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        mine = measured_by_us(prepared, recipe, Path(ours))
        whole = measured_by_us(prepared, original, Path(ours)).metrics
        other = Steps(Task.of(prepared, Path(theirs))).measured(recipe)
    if (mine.metrics, mine.items) != (other.metrics, other.items):
        raise RuntimeError(
            f"{recipe} came out as {mine.metrics}, and by Ray Tune's trials as {other.metrics}"
        )
    print(f"the same by both routes: {recipe}, {mine.metrics}", file=sys.stderr)
    labels = [one.label for one in passages]
    guessing = max(labels.count(label) for label in labels) / len(labels)
    return Bounds(whole["size_bytes"], whole["accuracy"], guessing)


def ordered(contestants: Sequence[str], seed: int) -> list[str]:
    """Whose turn is when: who was first is last with the next seed."""
    first = seed % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def front_size(points: Sequence[Point]) -> int:
    """How many different points of (size, accuracy) no other dominates."""
    rows = np.array(sorted({(one.size_bytes, one.accuracy) for one in points})).reshape(-1, 2)
    return int(nondominated(rows, OBJECTIVES).sum())


def reached(run: Run, level: float, within: Bounds) -> float:
    """The seconds after which a contestant's share is at least this; infinite where it never is."""
    for count, point in enumerate(run.points, start=1):
        if within.share(run.points[:count]) >= level:
            return point.seconds
    return math.inf


def table(runs: Sequence[Run], within: Bounds, seconds: float) -> str:
    quarters = " | ".join(f"{quarter:.0%}" for quarter in QUARTERS)
    lines = [
        f"| | seed | {quarters} | measured | different | front |",
        "|---|---|" + "---|" * (len(QUARTERS) + 3),
    ]
    names = list(dict.fromkeys(run.contestant for run in runs))
    for name in names:
        rows = {run.seed: _numbers(run, within, seconds) for run in runs if run.contestant == name}
        for seed, numbers in sorted(rows.items()):
            cells = [f"{one:.4f}" if isinstance(one, float) else str(one) for one in numbers]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
        if len(rows) > 1:
            columns = list(zip(*rows.values(), strict=True))
            shares = [f"{fmean(column):.4f} ± {stdev(column):.4f}" for column in columns[: len(QUARTERS)]]
            counts = [f"{fmean(column):.1f}" for column in columns[len(QUARTERS) :]]
            lines.append(f"| {name} | mean ± deviation | {' | '.join([*shares, *counts])} |")
    return "\n".join(lines)


def _numbers(run: Run, within: Bounds, seconds: float) -> list[float | int]:
    """The columns of the table: shares at each quarter, then counts."""
    points = run.until(seconds)
    shares: list[float | int] = [within.share(run.until(quarter * seconds)) for quarter in QUARTERS]
    return [*shares, len(points), len({point.recipe for point in points}), front_size(points)]


def caught_up(runs: Sequence[Run], within: Bounds, seconds: float) -> list[str]:
    """After how many minutes we were where each peer ended, by seed."""
    ours = {run.seed: run for run in runs if run.contestant == "slimfront"}
    lines = []
    for peer in (run for run in runs if run.contestant != "slimfront"):
        after = reached(ours[peer.seed], within.share(peer.until(seconds)), within)
        when = f"after {after / 60:.1f} minutes" if after <= seconds else "not in that time"
        lines.append(f"- seed {peer.seed}: slimfront was where {peer.contestant} ended {when}")
    return lines


def play(
    contestants: Mapping[str, Contestant], seeds: int, seconds: float, model: Path, texts: Path
) -> list[Run]:
    """Every contestant with every seed, each with a folder of its own, which is removed."""
    runs = []
    for seed in range(seeds):
        for name in ordered(list(contestants), seed):
            ends = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
            print(f"seed {seed}, {name}: runs until {ends}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                study = write_study(Path(folder), model, texts, seed)
                points = contestants[name](Match(study, Path(folder), seed, seconds))
            run = Run(name, seed, tuple(sorted(points, key=lambda point: point.seconds)))
            runs.append(run)
            count = len(run.until(seconds))
            print(
                f"seed {seed}, {name}: {count} measured in {seconds / 60:g} minutes",
                file=sys.stderr,
                flush=True,
            )
    return runs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="that each contestant has with each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--model", type=Path, help="where the classifier lies, or is to be kept; it takes minutes to make"
    )
    parser.add_argument("--olive", help="python of an environment with olive-ai")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser.parse_args()


def main() -> None:
    given = options()
    torch.set_num_threads(1)  # as a worker has
    contestants: dict[str, Contestant] = {"slimfront": slimfront, "ray tune": ray_tune}
    if given.olive:
        contestants["olive"] = functools.partial(olive, given.olive)
    else:
        print(
            "without Olive: give --olive PYTHON, of an environment in which olive-ai is installed",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = (given.model or folder / "model").resolve()
        if not (model / "config.json").is_file():
            genres.write_classifier(model)
        passages = genres.write(folder, TEXTS_EACH)
        prepared = prepare(load(write_study(folder, model, folder, 0)))
        within = bounds(prepared, passages)
        runs = play(contestants, given.seeds, 60 * given.minutes, model, folder)
    print(", ".join(f"{name} {value}" for name, value in environment(prepared.materials.target).items()))
    print(
        f"{given.minutes:g} minutes, {SLOTS} slots; the original has {within.size_bytes / 1e6:.1f} MB and accuracy "
        f"{within.accuracy:.3f}, guessing {within.guessing:.3f}; {prepared.space.size():.0f} choices"
    )
    print(table(runs, within, 60 * given.minutes))
    print()
    print("\n".join(caught_up(runs, within, 60 * given.minutes)))
    if given.json:
        record: dict[str, Any] = {
            "minutes": given.minutes, "slots": SLOTS, "bounds": asdict(within), "runs": [asdict(run) for run in runs],
            "environment": dict(environment(prepared.materials.target)),
        }  # fmt: skip
        given.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
