"""Measure the time that sharing saves: run one grid of candidates with full sharing, prefix sharing and no sharing.

python -m benchmarks.reuse [--quick] [--sample N] [--json FILE]

The grid has 5 pruning ratios (prune_ffn) × 4 ranks (svd_llm) × 5 integer formats (gptq), applied to the encoder in the
order of examples/minilm.yaml: 100 candidates, with 25 intermediate models between them and the original. It needs the
packages and the corpus of benchmarks.techniques. Every job runs through the product's own
`orchestrator.worker.work.work`, on one thread:

    full     like a study: one store, one folder of statistics, one worker with its caches
    prefix   one store, so that a shared prefix is compressed once; each job has an empty folder of statistics and a new
             worker
    none     each candidate is compressed from the original, with its own store and its own worker

A new worker is forked from a process that has loaded the libraries and read the texts, so these costs are not counted.
The modes take turns, one pruning ratio after the other, and both wall-clock and CPU time are reported, because other
processes may load the machine.

`full` runs the whole grid. `prefix` runs all shared prefixes, but only N candidates (drawn at random, the same number
for each pruning ratio), and their mean estimates the time of the remaining candidates; `none` runs half of these
candidates. Digests and metrics of a candidate must be equal, bit for bit, in all modes that ran it.
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

from benchmarks.techniques import VERDICTS, texts
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
"""Bits, and the number of weights that share a scale."""

METERS = ("size", "agreement")
CLAIMS: Mapping[Mode, float] = {"prefix": 2.0, "none": 5.0}
"""The least ratio of the grid's time in this mode to its time with full sharing."""


@dataclass(frozen=True)
class JobResult:
    """The result of one job in one mode."""

    mode: Mode
    recipe: str
    depth: int
    """Number of steps of the recipe."""
    seconds: float
    """Wall-clock time of the whole job."""
    cpu_seconds: float
    made: float
    """Seconds of compression, as reported by the job."""
    measured: float
    """Seconds of measurement, as reported by the job."""
    digest: str
    """Digest of the artifact."""
    metrics: Mapping[str, float]
    agreements: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class Grid:
    """All candidates, and the candidates that each mode runs."""

    root: Recipe
    rows: Sequence[Sequence[Recipe]]
    """One row per pruning ratio, in the order of execution."""
    sampled: Mapping[Mode, frozenset[str]]
    """Recipe ids of the candidates of each mode."""

    def jobs(self, mode: Mode, row: Sequence[Recipe]) -> list[Job]:
        """Return the jobs of a row in this mode: each prefix once, then the candidates."""
        chosen = [recipe for recipe in row if recipe.id in self.sampled[mode]]
        if mode == "none":
            return [Job(recipe, METERS, "reuse") for recipe in chosen]
        prefixes = {prefix.id: prefix for recipe in row for prefix in recipe.lineage()[1:-1]}
        prefix_jobs = [Job(prefix, (), "reuse") for prefix in prefixes.values()]
        return prefix_jobs + [Job(recipe, METERS, "reuse") for recipe in chosen]


def grid(materials: Materials, quick: bool, sample: int) -> Grid:
    original = sources.locate(materials.model)
    assert materials.calibration is not None
    root = Recipe(Origin(loading.digest(original), data.digest(materials.calibration), seed=0))
    ratios, keeps, packings = RATIOS, KEEPS, PACKINGS
    if quick:
        ratios, keeps, packings = RATIOS[1:3], KEEPS[1:3], PACKINGS[2:4]
    prune, factorize, pack = (techniques.load(name) for name in ("prune_ffn", "svd_llm", "gptq"))
    rows = []
    for ratio in ratios:
        pruned = root.then(prune.of({"ratio": ratio}))
        row = []
        for keep, (bits, group) in itertools.product(keeps, packings):
            factorized = pruned.then(factorize.of({"keep": keep}))
            row.append(factorized.then(pack.of({"bits": bits, "group": group})))
        rows.append(row)
    generator = random.Random(0)
    row_sample = min(len(rows[0]), max(2, sample // len(rows)))
    prefix = [generator.sample(row, row_sample) for row in rows]
    none = [row[: max(1, row_sample // 2)] for row in prefix]
    chosen: dict[Mode, list[list[Recipe]]] = {"full": rows, "prefix": prefix, "none": none}
    sampled = {}
    for mode, sampled_rows in chosen.items():
        sampled[mode] = frozenset(recipe.id for recipe in itertools.chain.from_iterable(sampled_rows))
    return Grid(root, rows, sampled)


def run_job(mode: Mode, job: Job, materials: Materials, folder: Path) -> JobResult:
    """Run one job, in the process of its worker."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        shared = folder / mode
        cache = Path(fresh) / "cache"
        if mode == "none":
            shared = Path(fresh)
        if mode == "full":
            cache = shared / "cache"
        context = WorkerContext(materials, str(shared / "store"), shared / "scratch", cache)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        outcome = work(job, context)
        seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
    if not isinstance(outcome, Success):
        raise RuntimeError(f"{job.recipe} failed: {outcome.message}\n{outcome.traceback}")
    measurement = outcome.measurement
    return JobResult(
        mode, str(job.recipe), len(job.recipe.steps), seconds, cpu_seconds, outcome.seconds,
        measurement.seconds, outcome.artifact, measurement.metrics,
        list(measurement.items.get("agreement", ())),
    )  # fmt: skip


def run(grid: Grid, materials: Materials, folder: Path) -> list[JobResult]:
    """Run the jobs of all modes; the modes take turns."""
    processes = multiprocessing.get_context("fork")
    results: list[JobResult] = []
    with processes.Pool(1) as warm, processes.Pool(1, maxtasksperchild=1) as fresh:
        pools: Mapping[Mode, Pool] = {"full": warm, "prefix": fresh, "none": fresh}
        for mode in ("full", "prefix"):
            original = Job(grid.root, METERS, "reuse")
            results.append(pools[mode].apply(run_job, (mode, original, materials, folder)))
        for row in grid.rows:
            for mode in MODES:
                for job in grid.jobs(mode, row):
                    results.append(pools[mode].apply(run_job, (mode, job, materials, folder)))
                print(_progress(mode, row, results), file=sys.stderr, flush=True)
    return results


def _progress(mode: Mode, row: Sequence[Recipe], results: Sequence[JobResult]) -> str:
    mode_results = [result for result in results if result.mode == mode]
    wall_seconds = sum(result.seconds for result in mode_results)
    cpu_seconds = sum(result.cpu_seconds for result in mode_results)
    return f"{row[0].steps[0]}, {mode}: {wall_seconds:.0f} s in all, {cpu_seconds:.0f} s of CPU time"


@dataclass(frozen=True)
class Total:
    """Seconds of one mode for the whole grid: the measured time, and an estimate for the candidates that did not run.

    The mean time of the candidates that ran is the estimate.
    """

    seconds: float
    error: float
    """Standard error of `seconds`."""


def total(results: Sequence[JobResult], mode: Mode, size: int, clock: Clock) -> Total:
    mode_results = [result for result in results if result.mode == mode]
    leaves = [getattr(result, clock) for result in mode_results if result.depth == 3]
    prefixes = sum(getattr(result, clock) for result in mode_results) - sum(leaves)
    missing = size - len(leaves)
    # The missing candidates vary like the sampled ones, and the sample mean that estimates them has an error too.
    variance = missing + missing**2 / len(leaves)
    error = 0.0
    if len(leaves) > 1:
        error = stdev(leaves) * variance**0.5
    return Total(prefixes + size * fmean(leaves), error)


def differing(results: Sequence[JobResult]) -> list[str]:
    """Return the recipes whose digest or measured values differ between two modes in any bit."""
    fingerprints: dict[str, set[str]] = {}
    for result in results:
        if result.depth in (0, 3):
            values = [result.digest, sorted(result.metrics.items()), result.agreements]
            fingerprints.setdefault(result.recipe, set()).add(json.dumps(values))
    return [recipe for recipe, distinct in fingerprints.items() if len(distinct) > 1]


def compared(results: Sequence[JobResult]) -> int:
    """Return the number of candidates that more than one mode ran."""
    by_mode: dict[Mode, set[str]] = {mode: set() for mode in MODES}
    for result in results:
        if result.depth == 3:
            by_mode[result.mode].add(result.recipe)
    return len(by_mode["full"] & (by_mode["prefix"] | by_mode["none"]))


def table(totals: Mapping[tuple[Mode, Clock], Total], results: Sequence[JobResult]) -> str:
    lines = [
        "| mode | candidates | grid, s | CPU, s | times full | times full, CPU "
        "| per candidate, s: compression | measurement | remaining |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        leaves = [result for result in results if result.mode == mode and result.depth == 3]
        compression = fmean(result.made for result in leaves)
        measurement = fmean(result.measured for result in leaves)
        remaining = fmean(result.seconds for result in leaves) - compression - measurement
        cells = [mode, str(len(leaves))]
        for clock in CLOCKS:
            mode_total = totals[mode, clock]
            cells.append(f"{mode_total.seconds:.0f}")
            if mode_total.error:
                cells[-1] += f" ± {mode_total.error:.0f}"
        cells += [f"{slowdown(totals, mode, clock):.2f}" for clock in CLOCKS]
        cells += [f"{seconds:.2f}" for seconds in (compression, measurement, remaining)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slowdown(totals: Mapping[tuple[Mode, Clock], Total], mode: Mode, clock: Clock) -> float:
    """Return the ratio of this mode's time to the time with full sharing."""
    return totals[mode, clock].seconds / totals["full", clock].seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a grid of 2 × 2 × 2, half the tokens; checks only equal bits"
    )
    parser.add_argument("--sample", type=int, default=20, help="candidates of `prefix`; `none` runs half")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # workers use one thread, and a fork needs it
    materials = texts(True, options.quick)
    original = sources.locate(materials.model)
    for source in (materials.calibration, materials.evaluation):
        assert source is not None
        data.windows_for(source, original)
    loading.load(original)
    memory.freeze_libraries()
    candidates = grid(materials, options.quick, options.sample)
    with tempfile.TemporaryDirectory() as folder:
        results = run(candidates, materials, Path(folder))
    size = sum(map(len, candidates.rows))
    totals = {(mode, clock): total(results, mode, size, clock) for mode in MODES for clock in CLOCKS}
    print(", ".join(f"{name} {value}" for name, value in environment(materials.target).items()))
    print(table(totals, results))
    print()
    different = differing(results)
    verdicts: dict[str, bool | None] = {}
    for mode, times in CLAIMS.items():
        claim = f"{mode} takes at least {times:g} times as long, by either clock"
        verdicts[claim] = None
        if not options.quick:
            verdicts[claim] = min(slowdown(totals, mode, clock) for clock in CLOCKS) >= times
    verdicts[f"the same bits in all {compared(results)} candidates made more than once"] = not different
    for claim, verdict in verdicts.items():
        print(f"- {VERDICTS[verdict]}: {claim}")
    if options.json:
        record = {
            "totals": {f"{mode} {clock}": asdict(value) for (mode, clock), value in totals.items()},
            "claims": verdicts, "differing": different, "jobs": [asdict(result) for result in results],
            "environment": dict(environment(materials.target)),
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1))
    return int(False in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
