"""Compare our searches with those of other libraries: the share of the exact front's hypervolume by evaluations.

Run from the repository's root: python -m benchmarks.search [--evaluations 100] [--seeds 5] [--problems TEXT]
[--searches a,b] [--budget 1000 [--search NAME]] [--jobs N] [--json FILE]
Every search proposes one choice and receives its result, in turns. Our searches also receive the metrics known before
execution; the searches of other libraries (benchmarks/search_peers.py) must measure them. Hypervolumes are of values
without noise, also where the results are noisy. With --budget, the number of evaluations is measured that one of our
searches needs for the hypervolume of the best NSGA-II after its budget, on the problems with metrics known before
execution. A full run takes hours: the Gaussian processes need up to seconds for each proposal.
The other libraries come with `pip install 'slimfront[bench]'`; a missing library is reported in its row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import search_peers
from benchmarks.search_problems import Problem, names, problem
from jobs.knobs import Value
from orchestrator import search
from orchestrator.pareto.front import Metrics
from orchestrator.search.search import Search, nothing_known

MARKS = (25, 50, 100, 200)
NSGA2 = ("nsga2", "optuna-nsga2", "pymoo-nsga2")


@dataclass(frozen=True)
class Run:
    """One search on one problem with one seed."""

    problem: str
    search: str
    seed: int
    evaluations: int


@dataclass(frozen=True)
class RunResult:
    """The hypervolumes that a run reached."""

    run: Run
    hypervolumes: tuple[float, ...] = ()
    """After each evaluation. The last value repeats when the search has nothing left to propose."""
    ask_ms: float = 0.0
    missing: str = ""
    """The reason why there are no hypervolumes."""


class ProductSearch:
    """Adapter of a slimfront search to the interface of a peer."""

    def __init__(self, adapted: Search) -> None:
        self._adapted = adapted

    def ask(self) -> dict[str, Value] | None:
        return next(iter(self._adapted.ask(1)), None)

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None:
        self._adapted.tell([(choices, metrics)])


def make(run: Run, task: Problem) -> search_peers.Peer:
    if run.search in search_peers.PEERS:
        return search_peers.make(run.search, task, run.seed)
    return ProductSearch(search.make(run.search, task.space, task.objectives, task.known, run.seed))


def execute(run: Run) -> RunResult:
    task = problem(run.problem)
    try:
        peer = make(run, task)
    except ModuleNotFoundError as error:
        return RunResult(run, missing=f"not installed ({error.name}): {search_peers.CURE}")
    generator = np.random.default_rng(run.seed)
    losses: list[tuple[float, ...]] = []
    hypervolumes: list[float] = []
    seconds = 0.0
    while len(hypervolumes) < run.evaluations:
        began = time.perf_counter()
        choices = peer.ask()
        seconds += time.perf_counter() - began
        if choices is None:
            hypervolumes += [hypervolumes[-1]] * (run.evaluations - len(hypervolumes))
            break
        noisy_metrics = evaluate_with_noise(task, choices, generator)
        losses.append(task.losses(choices))
        hypervolumes.append(task.hypervolume(np.array(losses)))
        began = time.perf_counter()
        peer.tell(choices, noisy_metrics)
        seconds += time.perf_counter() - began
    return RunResult(run, tuple(hypervolumes), 1000 * seconds / len(losses))


def evaluate_with_noise(
    task: Problem, choices: dict[str, Value], generator: np.random.Generator
) -> dict[str, float]:
    metrics = dict(task.evaluate(choices))
    for metric in metrics:
        if metric in task.noise:
            metrics[metric] += generator.normal() * task.noise[metric]
    return metrics


def execute_all(runs: Sequence[Run], jobs: int) -> Iterable[RunResult]:
    if jobs == 1:
        yield from map(execute, runs)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(execute, runs)


def shares(results: Iterable[RunResult], best: float) -> NDArray[np.float64]:
    """Return the share of the exact front's hypervolume after each evaluation, the mean over seeds."""
    return np.asarray(np.mean([result.hypervolumes for result in results], axis=0) / best)


def table(results: Sequence[RunResult], best: float, evaluations: int) -> dict[str, NDArray[np.float64]]:
    """Print a table with a row for each search, and return the shares of each search."""
    marks = [*(mark for mark in MARKS if mark < evaluations), evaluations]
    seeds = {result.run.seed for result in results}
    print(f"\n{results[0].run.problem} (mean of {len(seeds)} seeds, ± their deviation)")
    print(f"{'search':<14}" + "".join(f"{mark:>17}" for mark in marks) + f"{'ms per ask':>13}")
    curves = {}
    for name in dict.fromkeys(result.run.search for result in results):
        search_results = [result for result in results if result.run.search == name]
        if search_results[0].missing:
            print(f"{name:<14}  {search_results[0].missing}")
            continue
        curves[name] = shares(search_results, best)
        spread = np.std([result.hypervolumes for result in search_results], axis=0) / best
        ask_ms = np.mean([result.ask_ms for result in search_results])
        cells = (f"{curves[name][mark - 1]:>9.4f} ± {spread[mark - 1]:.3f}" for mark in marks)
        print(f"{name:<14}" + "".join(cells) + f"{ask_ms:>13.1f}", flush=True)
    return curves


def summary(curves: Mapping[str, Mapping[str, NDArray[np.float64]]], evaluations: int) -> None:
    """Print the mean over the problems."""
    marks = [*(mark for mark in MARKS if mark < evaluations), evaluations]
    print(f"\nmean of {len(curves)} problems")
    for name in next(iter(curves.values()), {}):
        mean_curve = np.mean([curve[name] for curve in curves.values()], axis=0)
        print(f"{name:<14}" + "".join(f"{mean_curve[mark - 1]:>17.4f}" for mark in marks))


def catching_up(name: str, problems: Sequence[str], options: argparse.Namespace) -> list[dict[str, object]]:
    """Print and return the number of evaluations until `name` reaches the best NSGA-II after its budget.

    Both are compared by their means over seeds.
    """
    rows: list[dict[str, object]] = []
    print(f"\nevaluations until {name} reaches the best NSGA-II after {options.budget}")
    for label in problems:
        best = problem(label).best()
        final_shares = {}
        for rival in NSGA2:
            rival_results = run_all(label, [rival], options.budget, options)
            if not rival_results[0].missing:
                final_shares[rival] = float(shares(rival_results, best)[-1])
        best_rival = max(final_shares, key=final_shares.__getitem__)
        curve = shares(run_all(label, [name], options.evaluations, options), best)
        reached = np.flatnonzero(curve >= final_shares[best_rival])
        needed: int | None = None
        if len(reached):
            needed = int(reached[0]) + 1
        share = final_shares[best_rival]
        rows.append({"problem": label, "rival": best_rival, "share": share, "after": needed})
        print(
            f"{label:<32}{best_rival:<14}{share:.4f}   {needed or f'more than {options.evaluations}'}",
            flush=True,
        )
        missing = [rival for rival in NSGA2 if rival not in final_shares]
        if missing:
            print(f"    without {', '.join(missing)}, not installed: {search_peers.CURE}")
    return rows


def run_all(
    label: str, searches: Sequence[str], evaluations: int, options: argparse.Namespace
) -> list[RunResult]:
    runs = [Run(label, name, seed, evaluations) for name in searches for seed in range(options.seeds)]
    return list(execute_all(runs, options.jobs))


def parse_options() -> argparse.Namespace:
    searches = [*search.names(), *search_peers.PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", default="", help="parts of the names, separated by commas")
    parser.add_argument("--searches", default=",".join(searches), help=f"of {', '.join(searches)}")
    parser.add_argument(
        "--budget", type=int, default=0, help="evaluations of NSGA-II, whose share --search must reach (1000)"
    )
    parser.add_argument("--search", default="surrogate", help="the search compared with NSGA-II")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write all numbers to this file as well")
    options = parser.parse_args()
    for name in options.searches.split(","):
        if name not in searches:
            parser.error(f"--searches: got {name}, expected some of {', '.join(searches)}")
    return options


def main() -> None:
    options = parse_options()
    patterns = options.problems.split(",")
    chosen = []
    for name in names():
        if any(pattern in name for pattern in patterns):
            chosen.append(name)
    try:
        with_known_metrics = [label for label in chosen if problem(label).known is not nothing_known]
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from error
    curves: dict[str, dict[str, NDArray[np.float64]]] = {}
    results: list[RunResult] = []
    for label in chosen:
        problem_results = run_all(label, options.searches.split(","), options.evaluations, options)
        curves[label] = table(problem_results, problem(label).best(), options.evaluations)
        results += problem_results
    summary(curves, options.evaluations)
    caught_up: list[dict[str, object]] = []
    if options.budget:
        caught_up = catching_up(options.search, with_known_metrics, options)
    if options.json is not None:
        record = {"runs": [asdict(result) for result in results], "caught": caught_up}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
