"""Our searches beside other libraries': the share of the exact front's hypervolume that some evaluations reach.

Run from the repository's root: python -m benchmarks.search [--evaluations 100] [--seeds 5] [--problems TEXT]
[--searches a,b] [--budget 1000 [--search NAME]] [--jobs N] [--json FILE]
Every search is asked for one choice and told its result, in turns. Ours are told what is known of a choice, others
measure it (benchmarks/search_peers.py); hypervolumes are of true values, also where results are noisy.
With --budget, how soon one of ours is where the best NSGA-II is after so many evaluations, where something is known.
All of it takes hours: the Gaussian processes need up to seconds for each ask.
Peers come with `pip install 'slimfront[bench]'`; what is missing is a row that says so.
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
class Found:
    """hypervolumes: after each evaluation. A search that had nothing more to propose stays where it was.
    missing: why there are none."""

    run: Run
    hypervolumes: tuple[float, ...] = ()
    ask_ms: float = 0.0
    missing: str = ""


class Ours:
    """A search of ours as a peer is run."""

    def __init__(self, trying: Search) -> None:
        self._trying = trying

    def ask(self) -> dict[str, Value] | None:
        return next(iter(self._trying.ask(1)), None)

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None:
        self._trying.tell([(choices, metrics)])


def made(run: Run, given: Problem) -> search_peers.Peer:
    if run.search in search_peers.PEERS:
        return search_peers.make(run.search, given, run.seed)
    return Ours(search.make(run.search, given.space, given.objectives, given.known, run.seed))


def execute(run: Run) -> Found:
    given = problem(run.problem)
    try:
        trying = made(run, given)
    except ModuleNotFoundError as error:
        return Found(run, missing=f"not installed ({error.name}): {search_peers.CURE}")
    generator = np.random.default_rng(run.seed)
    losses: list[tuple[float, ...]] = []
    hypervolumes: list[float] = []
    seconds = 0.0
    while len(hypervolumes) < run.evaluations:
        began = time.perf_counter()
        choices = trying.ask()
        seconds += time.perf_counter() - began
        if choices is None:
            hypervolumes += [hypervolumes[-1]] * (run.evaluations - len(hypervolumes))
            break
        told = noisy(given, choices, generator)
        losses.append(given.losses(choices))
        hypervolumes.append(given.hypervolume(np.array(losses)))
        began = time.perf_counter()
        trying.tell(choices, told)
        seconds += time.perf_counter() - began
    return Found(run, tuple(hypervolumes), 1000 * seconds / len(losses))


def noisy(given: Problem, choices: dict[str, Value], generator: np.random.Generator) -> dict[str, float]:
    return {
        metric: value + generator.normal() * given.noise[metric] if metric in given.noise else value
        for metric, value in given.evaluate(choices).items()
    }


def execute_all(runs: Sequence[Run], jobs: int) -> Iterable[Found]:
    if jobs == 1:
        yield from map(execute, runs)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(execute, runs)


def shares(found: Iterable[Found], best: float) -> NDArray[np.float64]:
    """Of the exact front's hypervolume, after each evaluation: the mean over seeds."""
    return np.asarray(np.mean([one.hypervolumes for one in found], axis=0) / best)


def table(found: Sequence[Found], best: float, evaluations: int) -> dict[str, NDArray[np.float64]]:
    """Prints a problem's, a row a search; each search's shares."""
    marks = [*(mark for mark in MARKS if mark < evaluations), evaluations]
    print(
        f"\n{found[0].run.problem} (mean of {len({one.run.seed for one in found})} seeds, ± their deviation)"
    )
    print(f"{'search':<14}" + "".join(f"{mark:>17}" for mark in marks) + f"{'ms per ask':>13}")
    curves = {}
    for name in dict.fromkeys(one.run.search for one in found):
        those = [one for one in found if one.run.search == name]
        if those[0].missing:
            print(f"{name:<14}  {those[0].missing}")
            continue
        curves[name] = shares(those, best)
        spread = np.std([one.hypervolumes for one in those], axis=0) / best
        cells = (f"{curves[name][mark - 1]:>9.4f} ± {spread[mark - 1]:.3f}" for mark in marks)
        print(f"{name:<14}" + "".join(cells) + f"{np.mean([one.ask_ms for one in those]):>13.1f}", flush=True)
    return curves


def summary(curves: Mapping[str, Mapping[str, NDArray[np.float64]]], evaluations: int) -> None:
    """Prints the mean over the problems."""
    marks = [*(mark for mark in MARKS if mark < evaluations), evaluations]
    print(f"\nmean of {len(curves)} problems")
    for name in next(iter(curves.values()), {}):
        means = (np.mean([curve[name][mark - 1] for curve in curves.values()]) for mark in marks)
        print(f"{name:<14}" + "".join(f"{mean:>17.4f}" for mean in means))


def catching_up(name: str, problems: Sequence[str], given: argparse.Namespace) -> list[dict[str, object]]:
    """After how many evaluations `name` is where the best NSGA-II is after the budget, by means over seeds; printed."""
    rows: list[dict[str, object]] = []
    print(f"\nevaluations until {name} is where the best NSGA-II is after {given.budget}")
    for label in problems:
        best = problem(label).best()
        all_rivals = {rival: run_all(label, [rival], given.budget, given) for rival in NSGA2}
        ends = {
            rival: float(shares(found, best)[-1])
            for rival, found in all_rivals.items()
            if not found[0].missing
        }
        rival = max(ends, key=lambda one: ends[one])
        curve = shares(run_all(label, [name], given.evaluations, given), best)
        reached = np.flatnonzero(curve >= ends[rival])
        after = int(reached[0]) + 1 if len(reached) else None
        rows.append({"problem": label, "rival": rival, "share": ends[rival], "after": after})
        print(
            f"{label:<32}{rival:<14}{ends[rival]:.4f}   {after or f'more than {given.evaluations}'}",
            flush=True,
        )
        missing = [rival for rival in NSGA2 if rival not in ends]
        if missing:
            print(f"    without {', '.join(missing)}, not installed: {search_peers.CURE}")
    return rows


def run_all(label: str, searches: Sequence[str], evaluations: int, given: argparse.Namespace) -> list[Found]:
    runs = [Run(label, name, seed, evaluations) for name in searches for seed in range(given.seeds)]
    return list(execute_all(runs, given.jobs))


def options() -> argparse.Namespace:
    every = [*search.names(), *search_peers.PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", default="", help="those that contain one of these, separated by commas")
    parser.add_argument("--searches", default=",".join(every), help=f"of {', '.join(every)}")
    parser.add_argument("--budget", type=int, default=0, help="of NSGA-II, to be reached by --search (1000)")
    parser.add_argument("--search", default="surrogate", help="the search that is to reach it")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write all numbers to this file as well")
    given = parser.parse_args()
    for name in given.searches.split(","):
        if name not in every:
            parser.error(f"--searches: got {name}, expected some of {', '.join(every)}")
    return given


def main() -> None:
    given = options()
    chosen = [name for name in names() if any(text in name for text in given.problems.split(","))]
    try:
        known = [label for label in chosen if problem(label).known is not nothing_known]
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from error
    curves: dict[str, dict[str, NDArray[np.float64]]] = {}
    found: list[Found] = []
    for label in chosen:
        here = run_all(label, given.searches.split(","), given.evaluations, given)
        curves[label] = table(here, problem(label).best(), given.evaluations)
        found += here
    summary(curves, given.evaluations)
    caught = catching_up(given.search, known, given) if given.budget else []
    if given.json is not None:
        given.json.write_text(
            json.dumps({"runs": [asdict(one) for one in found], "caught": caught}, indent=1)
        )


if __name__ == "__main__":
    main()
