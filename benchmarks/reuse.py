"""What sharing saves: one grid of candidates made and measured with it, with prefix sharing alone, and without.

python -m benchmarks.reuse [--quick] [--sample N] [--json FILE]

5 shares of neurons pruned (prune_ffn) × 4 ranks (svd_llm) × 5 sorts of integers (gptq), one step after the other in the
order in which examples/minilm.yaml has them, on the encoder: 100 candidates, 25 models between them and the original.
Needs what benchmarks.techniques needs. Every job is done by the product's own
`orchestrator.worker.work.work`, on one thread:

    full     as a study does it: one store, one folder of statistics, one worker that keeps what it has read
    prefix   one store, so that a shared prefix is made once; each job has an empty folder of statistics, and a worker
             that keeps nothing
    none     each candidate is made from the original, in a store and by a worker of its own

A worker that keeps nothing is forked from a process that has loaded the libraries and read the texts: what is new
to it is not counted. The modes take turns, one share of neurons after the other, since the machine is not ours
alone, and for the same reason the processor's time is told beside that of the clock.

`full` makes all of the grid. `prefix` makes all that candidates share, but only N candidates (drawn at random, as many
of each share of neurons), and their mean stands for the rest; `none` makes half of these. Digests and metrics must
be equal, bit for bit, wherever two modes made the same candidate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch

from benchmarks.techniques import texts
from jobs import data, techniques
from jobs.job import Job, Success
from jobs.materials import Materials
from jobs.measure import environment
from jobs.models import loading, memory, sources
from jobs.recipe import Origin, Recipe
from orchestrator.worker.work import WorkerContext, work

Mode = Literal["full", "prefix", "none"]
MODES: tuple[Mode, ...] = ("full", "prefix", "none")
Clock = Literal["seconds", "cpu_seconds"]
CLOCKS: tuple[Clock, ...] = ("seconds", "cpu_seconds")

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625)
KEEPS = (0.9, 0.8, 0.7, 0.6)
PACKINGS = ((8, 64), (4, 32), (4, 64), (3, 64), (2, 64))
"""Bits, and weights that share a scale."""

METERS = ("size", "agreement")
CLAIMS: Mapping[Mode, float] = {"prefix": 2.0, "none": 5.0}
"""How many times as long the grid takes without full sharing."""


@dataclass(frozen=True)
class Done:
    """One job of one mode. seconds: all of it; made, measured: of these, by the job's own account. cpu_seconds: what
    the processor worked for it. digest: of the artifact."""

    mode: Mode
    recipe: str
    depth: int
    seconds: float
    cpu_seconds: float
    made: float
    measured: float
    digest: str
    metrics: Mapping[str, float]
    agreements: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class Grid:
    """The candidates by their share of neurons, in the order in which they are made; two lists of those to sample."""

    root: Recipe
    rows: Sequence[Sequence[Recipe]]
    sampled: Mapping[Mode, frozenset[str]]

    def jobs(self, mode: Mode, row: Sequence[Recipe]) -> list[Job]:
        """What a mode does of a row, prefixes first, each once."""
        chosen = [recipe for recipe in row if recipe.id in self.sampled[mode]]
        if mode == "none":
            return [Job(recipe, METERS, "reuse") for recipe in chosen]
        prefixes = {prefix.id: prefix for recipe in row for prefix in recipe.lineage()[1:-1]}
        found = [Job(prefix, (), "reuse") for prefix in prefixes.values()]
        return found + [Job(recipe, METERS, "reuse") for recipe in chosen]


def grid(materials: Materials, quick: bool, sample: int) -> Grid:
    original = sources.locate(materials.model)
    assert materials.calibration is not None
    root = Recipe(Origin(loading.digest(original), data.digest(materials.calibration), seed=0))
    ratios, keeps, packings = RATIOS, KEEPS, PACKINGS
    if quick:
        ratios, keeps, packings = RATIOS[1:3], KEEPS[1:3], PACKINGS[2:4]
    prune, factorize, pack = (techniques.load(name) for name in ("prune_ffn", "svd_llm", "gptq"))
    rows = [
        [
            root.then(prune.of({"ratio": ratio}))
            .then(factorize.of({"keep": keep}))
            .then(pack.of({"bits": bits, "group": group}))
            for keep, (bits, group) in itertools.product(keeps, packings)
        ]
        for ratio in ratios
    ]
    drawn = random.Random(0)
    each = min(len(rows[0]), max(2, sample // len(rows)))
    prefix = [drawn.sample(row, each) for row in rows]
    none = [row[: max(1, each // 2)] for row in prefix]
    chosen: dict[Mode, Sequence[Sequence[Recipe]]] = {"full": rows, "prefix": prefix, "none": none}
    return Grid(root, rows, {mode: frozenset(r.id for row in of for r in row) for mode, of in chosen.items()})


def do(mode: Mode, job: Job, materials: Materials, folder: Path) -> Done:
    """One job, in the process of its worker."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        shared = Path(fresh) if mode == "none" else folder / mode
        cache = folder / mode / "cache" if mode == "full" else Path(fresh) / "cache"
        place = WorkerContext(materials, str(shared / "store"), shared / "scratch", cache)
        started, worked = time.perf_counter(), time.process_time()
        outcome = work(job, place)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if not isinstance(outcome, Success):
        raise RuntimeError(f"{job.recipe} failed: {outcome.message}\n{outcome.traceback}")
    found = outcome.measurement
    return Done(
        mode, str(job.recipe), len(job.recipe.steps), seconds, cpu_seconds, outcome.seconds, found.seconds,
        outcome.artifact, found.metrics, list(found.items.get("agreement", ())),
    )  # fmt: skip


def run(grid: Grid, materials: Materials, folder: Path) -> list[Done]:
    """All modes, in turns."""
    processes = multiprocessing.get_context("fork")
    found: list[Done] = []
    with processes.Pool(1) as warm, processes.Pool(1, maxtasksperchild=1) as fresh:
        pools: Mapping[Mode, Pool] = {"full": warm, "prefix": fresh, "none": fresh}
        for mode in ("full", "prefix"):
            found.append(pools[mode].apply(do, (mode, Job(grid.root, METERS, "reuse"), materials, folder)))
        for row in grid.rows:
            for mode in MODES:
                for job in grid.jobs(mode, row):
                    found.append(pools[mode].apply(do, (mode, job, materials, folder)))
                print(_progress(mode, row, found), file=sys.stderr, flush=True)
    return found


def _progress(mode: Mode, row: Sequence[Recipe], found: Sequence[Done]) -> str:
    mine = [done for done in found if done.mode == mode]
    clock, cpu = sum(done.seconds for done in mine), sum(done.cpu_seconds for done in mine)
    return f"{row[0].steps[0]}, {mode}: {clock:.0f} s in all, {cpu:.0f} s of the processor's"


@dataclass(frozen=True)
class Total:
    """Seconds of one mode for the whole grid: those of what was made, and for the rest what the mean of the candidates
    that were made says. error: the standard error of that."""

    seconds: float
    error: float


def total(found: Sequence[Done], mode: Mode, size: int, clock: Clock) -> Total:
    mine = [done for done in found if done.mode == mode]
    leaves = [getattr(done, clock) for done in mine if done.depth == 3]
    prefixes = sum(getattr(done, clock) for done in mine) - sum(leaves)
    missing = size - len(leaves)
    # What is missing varies as what was made does, and its mean is known from that alone.
    variance = missing + missing**2 / len(leaves)
    error = stdev(leaves) * variance**0.5 if len(leaves) > 1 else 0.0
    return Total(prefixes + size * fmean(leaves), error)


def differing(found: Sequence[Done]) -> list[str]:
    """The recipes that two modes made differently, in any bit of the files or of what was measured on them."""
    seen: dict[str, set[object]] = {}
    for done in found:
        if done.depth in (0, 3):
            bits = [done.digest, sorted(done.metrics.items()), done.agreements]
            seen.setdefault(done.recipe, set()).add(json.dumps(bits))
    return [recipe for recipe, ways in seen.items() if len(ways) > 1]


def compared(found: Sequence[Done]) -> int:
    """How many candidates more than one mode made."""
    by_mode = [{done.recipe for done in found if done.mode == mode and done.depth == 3} for mode in MODES]
    return len(by_mode[0] & (by_mode[1] | by_mode[2]))


def table(totals: Mapping[tuple[Mode, Clock], Total], found: Sequence[Done]) -> str:
    lines = [
        "| mode | made | grid, s | of the processor's | times full | of the processor's "
        "| a candidate, s: made | measured | the rest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        leaves = [done for done in found if done.mode == mode and done.depth == 3]
        made, measured = fmean(d.made for d in leaves), fmean(d.measured for d in leaves)
        rest = fmean(d.seconds for d in leaves) - made - measured
        both = [totals[mode, clock] for clock in CLOCKS]
        seconds = [f"{one.seconds:.0f}" + (f" ± {one.error:.0f}" if one.error else "") for one in both]
        times = [f"{slower(totals, mode, clock):.2f}" for clock in CLOCKS]
        cells = [mode, str(len(leaves)), *seconds, *times, *(f"{s:.2f}" for s in (made, measured, rest))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slower(totals: Mapping[tuple[Mode, Clock], Total], mode: Mode, clock: Clock) -> float:
    """How many times as long as with full sharing."""
    return totals[mode, clock].seconds / totals["full", clock].seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a grid of 2 × 2 × 2, half the tokens; tells of equal bits alone"
    )
    parser.add_argument("--sample", type=int, default=20, help="candidates of `prefix`; `none` makes half")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as a worker has, and forks need
    materials = texts(True, given.quick)
    original = sources.locate(materials.model)
    for source in (materials.calibration, materials.evaluation):
        assert source is not None
        data.windows_for(source, original)
    loading.load(original)
    memory.freeze_libraries()
    shape = grid(materials, given.quick, given.sample)
    with tempfile.TemporaryDirectory() as folder:
        found = run(shape, materials, Path(folder))
    size = sum(map(len, shape.rows))
    totals = {(mode, clock): total(found, mode, size, clock) for mode in MODES for clock in CLOCKS}
    print(", ".join(f"{name} {value}" for name, value in environment(materials.target).items()))
    print(table(totals, found))
    print()
    different = differing(found)
    held: dict[str, bool | None] = {
        f"{mode} takes at least {times:g} times as long, by either clock": None
        if given.quick
        else all(slower(totals, mode, clock) >= times for clock in CLOCKS)
        for mode, times in CLAIMS.items()
    }
    held[f"the same bits in all {compared(found)} candidates made more than once"] = not different
    for claim, holds in held.items():
        print(f"- {'not run' if holds is None else 'holds' if holds else 'FAILS'}: {claim}")
    if given.json:
        record = {
            "totals": {f"{mode} {clock}": asdict(one) for (mode, clock), one in totals.items()},
            "claims": held, "differing": different,
            "jobs": [asdict(done) for done in found], "environment": dict(environment(materials.target)),
        }  # fmt: skip
        given.json.write_text(json.dumps(record, indent=1))
    return 1 if False in held.values() else 0


if __name__ == "__main__":
    sys.exit(main())
