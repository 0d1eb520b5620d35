"""Compare searches in the same minutes on the same machine: slimfront, Ray Tune and, if it is installed, Olive.

python -m benchmarks.front [--minutes M] [--seeds N] [--model FOLDER] [--olive PYTHON] [--json FILE]

The model is a classifier of Brown's sorts of prose (benchmarks/genres.py; FOLDER keeps it for later runs). The space is
that of examples/minilm.yaml, the objectives are its size (min) and its accuracy (max). Nothing is timed, so candidates
may run at the same time. The benchmark needs the packages and data of benchmarks.techniques, and ray[tune].

    slimfront   `slimfront search` on a new, empty store, without MLflow
    ray tune    OptunaSearch with its default sampler and warm actors; a trial makes its recipe by the same jobs and
                meters (benchmarks/peer_ray_tune.py); before the comparison, both must give equal metrics for one recipe
    olive       a search over its own passes, measured on the same texts (benchmarks/peer_olive.py)

Each contestant has two slots of one thread (Olive, which tries one model at a time, has two threads). Its time begins
with the start of its process, so imports count. Candidates that are not complete when the time is over do not count.
The order of the contestants rotates with the seed. The hypervolume is that of all candidates that a contestant has
measured, as a share of the hypervolume of a model with the original's accuracy and no bytes. It is bounded by the
original's size in bf16 and by the accuracy of always predicting the most frequent sort.
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
"""Passages of each of the 93 evaluation documents."""
GRACE_SECONDS = 60.0
"""Time for a contestant to end after its time is over."""
OBJECTIVES = (Objective("size_bytes", "min"), Objective("accuracy", "max"))
FIXED: Mapping[str, Value] = {
    "depth": "drop_layers", "depth.drop_layers.count": 1, "width": "prune_ffn", "width.prune_ffn.ratio": 0.25,
    "rank": "svd_llm", "rank.svd_llm.keep": 0.9, "recover": "distill", "bits": "gptq", "bits.gptq.bits": 4,
    "bits.gptq.embedding_bits": 8,
}  # fmt: skip
"""Choices for which both routes must make the same model."""


@dataclass(frozen=True)
class Point:
    """A measured candidate."""

    seconds: float
    """Time since the start of the contestant."""
    recipe: str
    size_bytes: float
    accuracy: float


@dataclass(frozen=True)
class Bounds:
    """Size and accuracy of the original, which bound the hypervolume."""

    size_bytes: float
    accuracy: float
    guessing: float
    """Accuracy of always predicting the most frequent label."""

    def share(self, points: Sequence[Point]) -> float:
        losses = np.array([(point.size_bytes, -point.accuracy) for point in points])
        volume = hypervolume(losses, np.array([self.size_bytes, -self.guessing]))
        return volume / (self.size_bytes * (self.accuracy - self.guessing))


@dataclass(frozen=True)
class Match:
    """One run of a contestant."""

    study: Path
    """The study's file."""
    folder: Path
    """A folder for this run alone, with nothing but the study."""
    seed: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """The candidates that a contestant measured with one seed, in the order of time."""

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
    points = []
    for at, event in events:
        if isinstance(event, CandidateProposed):
            recipes[_measuring_job(prepared, event.recipe).id] = event.recipe
        elif (
            isinstance(event, AttemptEnded) and event.job_id in recipes and isinstance(event.outcome, Success)
        ):
            metrics = event.outcome.measurement.metrics
            recipe = str(recipes[event.job_id])
            points.append(Point(at - began, recipe, metrics["size_bytes"], metrics["accuracy"]))
    return points


def ray_tune(match: Match) -> list[Point]:
    began, out = time.time(), match.folder / "trials.jsonl"
    until = began + match.seconds
    module = [sys.executable, "-m", "benchmarks.peer_ray_tune"]
    # It receives the time to end, and ends by itself.
    run_until(
        until + GRACE_SECONDS, [*module, str(match.study), str(match.seed), str(until), str(out)], match
    )
    return recorded(out, began)


def olive(python: str, match: Match) -> list[Point]:
    began, out = time.time(), match.folder / "models.jsonl"
    study = yaml.safe_load(match.study.read_text())
    script = str(Path(__file__).with_name("peer_olive.py"))
    arguments = [study["model"], study["data"]["labelled"], str(match.seed), str(SLOTS), str(out)]
    run_until(began + match.seconds, [python, script, *arguments], match)
    return recorded(out, began)


def recorded(file: Path, began: float) -> list[Point]:
    """Return the candidates of a peer's file. Each has a line; an incomplete last line is ignored."""
    points: list[Point] = []
    if not file.is_file():
        return points
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            trial = json.loads(line)
            point = Point(trial["ended"] - began, trial["recipe"], trial["size_bytes"], trial["accuracy"])
            points.append(point)
    return points


def run_until(deadline: float, command: Sequence[str], match: Match) -> None:
    """Run a contestant, and end it when its time is over. Raises RuntimeError if it fails before."""
    log = match.folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **one_thread()}
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
    """Write the example's study with this model, the texts of a folder, and no effective limit of candidates."""
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


def _measuring_job(prepared: PreparedStudy, recipe: Recipe) -> Job:
    return Job(recipe, prepared.plan.meters, prepared.plan.materials_digest)


def measure_by_worker(prepared: PreparedStudy, recipe: Recipe, folder: Path) -> Measurement:
    context = WorkerContext(
        prepared.materials, str(folder / "store"), folder / "scratch", folder / "statistics"
    )
    *prefixes, last = recipe.lineage()
    for prefix in prefixes:
        work(Job(prefix, (), ""), context)
    outcome = work(_measuring_job(prepared, last), context)
    if not isinstance(outcome, Success):
        raise RuntimeError(f"{last} failed: {outcome.message}")
    return outcome.measurement


def bounds(prepared: PreparedStudy, passages: Sequence[genres.Passage]) -> Bounds:
    """Return the bounds of the hypervolume. Raises RuntimeError if the two routes give different metrics."""
    original = prepared.plan.original
    recipe = prepared.space.recipe(original.origin, FIXED)
    print(f"making {recipe} by both routes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as worker_folder, tempfile.TemporaryDirectory() as trial_folder:
        by_worker = measure_by_worker(prepared, recipe, Path(worker_folder))
        original_metrics = measure_by_worker(prepared, original, Path(worker_folder)).metrics
        by_trial = Steps(Task.of(prepared, Path(trial_folder))).measured(recipe)
    if (by_worker.metrics, by_worker.items) != (by_trial.metrics, by_trial.items):
        raise RuntimeError(
            f"{recipe} has metrics {by_worker.metrics} in a worker, and {by_trial.metrics} in a trial of Ray Tune"
        )
    print(f"equal by both routes: {recipe}, {by_worker.metrics}", file=sys.stderr)
    labels = [passage.label for passage in passages]
    guessing = max(labels.count(label) for label in labels) / len(labels)
    return Bounds(original_metrics["size_bytes"], original_metrics["accuracy"], guessing)


def ordered(contestants: Sequence[str], seed: int) -> list[str]:
    """Return the order of the contestants. The first is the last with the next seed."""
    first = seed % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def front_size(points: Sequence[Point]) -> int:
    """Return the number of different nondominated points of (size, accuracy)."""
    rows = np.array(sorted({(point.size_bytes, point.accuracy) for point in points})).reshape(-1, 2)
    return int(nondominated(rows, OBJECTIVES).sum())


def reached(run: Run, level: float, limits: Bounds) -> float:
    """Return the seconds until a contestant's share is at least `level`; infinite if it never is."""
    for count, point in enumerate(run.points, start=1):
        if limits.share(run.points[:count]) >= level:
            return point.seconds
    return math.inf


def table(runs: Sequence[Run], limits: Bounds, seconds: float) -> str:
    quarters = " | ".join(f"{quarter:.0%}" for quarter in QUARTERS)
    lines = [
        f"| | seed | {quarters} | measured | different | front |",
        "|---|---|" + "---|" * (len(QUARTERS) + 3),
    ]
    names = list(dict.fromkeys(run.contestant for run in runs))
    for name in names:
        rows = {run.seed: _numbers(run, limits, seconds) for run in runs if run.contestant == name}
        for seed, numbers in sorted(rows.items()):
            shares = [f"{share:.4f}" for share in numbers[: len(QUARTERS)]]
            cells = [*shares, *map(str, numbers[len(QUARTERS) :])]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
        if len(rows) > 1:
            columns = list(zip(*rows.values(), strict=True))
            shares = [f"{fmean(column):.4f} ± {stdev(column):.4f}" for column in columns[: len(QUARTERS)]]
            counts = [f"{fmean(column):.1f}" for column in columns[len(QUARTERS) :]]
            lines.append(f"| {name} | mean ± deviation | {' | '.join([*shares, *counts])} |")
    return "\n".join(lines)


def _numbers(run: Run, limits: Bounds, seconds: float) -> list[float | int]:
    """Return the columns of the table: the share at each quarter, then counts."""
    points = run.until(seconds)
    shares: list[float | int] = [limits.share(run.until(quarter * seconds)) for quarter in QUARTERS]
    return [*shares, len(points), len({point.recipe for point in points}), front_size(points)]


def caught_up(runs: Sequence[Run], limits: Bounds, seconds: float) -> list[str]:
    """Return lines with the minutes until slimfront reached the final share of each peer, by seed."""
    ours = {run.seed: run for run in runs if run.contestant == "slimfront"}
    lines = []
    for peer in (run for run in runs if run.contestant != "slimfront"):
        reached_after = reached(ours[peer.seed], limits.share(peer.until(seconds)), limits)
        when = "not in that time"
        if reached_after <= seconds:
            when = f"after {reached_after / 60:.1f} minutes"
        lines.append(f"- seed {peer.seed}: slimfront reached the final share of {peer.contestant} {when}")
    return lines


def play(
    contestants: Mapping[str, Contestant], seeds: int, seconds: float, model: Path, texts: Path
) -> list[Run]:
    """Run every contestant with every seed. Every run has a temporary folder of its own."""
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of each contestant with each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--model", type=Path, help="folder that keeps the classifier, which takes minutes to make"
    )
    parser.add_argument("--olive", help="python of an environment with olive-ai")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)  # as a worker has
    contestants: dict[str, Contestant] = {"slimfront": slimfront, "ray tune": ray_tune}
    if options.olive:
        contestants["olive"] = functools.partial(olive, options.olive)
    else:
        print(
            "without Olive: give --olive PYTHON, of an environment in which olive-ai is installed",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = (options.model or folder / "model").resolve()
        if not (model / "config.json").is_file():
            genres.write_classifier(model)
        passages = genres.write(folder, TEXTS_EACH)
        prepared = prepare(load(write_study(folder, model, folder, 0)))
        limits = bounds(prepared, passages)
        runs = play(contestants, options.seeds, 60 * options.minutes, model, folder)
    print(", ".join(f"{name} {value}" for name, value in environment(prepared.materials.target).items()))
    print(
        f"{options.minutes:g} minutes, {SLOTS} slots; the original has {limits.size_bytes / 1e6:.1f} MB and accuracy "
        f"{limits.accuracy:.3f}, guessing {limits.guessing:.3f}; {prepared.space.size():.0f} choices"
    )
    print(table(runs, limits, 60 * options.minutes))
    print()
    print("\n".join(caught_up(runs, limits, 60 * options.minutes)))
    if options.json:
        record: dict[str, Any] = {
            "minutes": options.minutes, "slots": SLOTS, "bounds": asdict(limits), "runs": [asdict(run) for run in runs],
            "environment": dict(environment(prepared.materials.target)),
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
