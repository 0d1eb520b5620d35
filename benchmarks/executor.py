"""The overhead of an executor: milliseconds per empty job through two warm slots.

Run from the repository's root: python -m benchmarks.executor [--pieces 1000]
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing

from cluster.executors.executor import Executor, Resources
from cluster.executors.inline import InlineExecutor
from cluster.on_ray.executor import RayExecutor


def all_at_once(executor: Executor, pieces: int) -> float:
    """Return the milliseconds per job when all jobs are submitted first."""
    start = time.perf_counter()
    for number in range(pieces):
        executor.submit(str(number), abs, number, resources=Resources())
    ended = 0
    while ended < pieces:
        ended += len(executor.wait())
    return (time.perf_counter() - start) * 1e3 / pieces


def one_by_one(executor: Executor, pieces: int) -> float:
    """Return the milliseconds per job when each job is submitted after the end of the previous one."""
    return sum(all_at_once(executor, 1) for _ in range(pieces)) / pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=1000, help="number of empty jobs")
    options = parser.parse_args()
    for name, make in (("inline", InlineExecutor), ("ray", lambda: RayExecutor(slots=2))):
        with closing(make()) as executor:
            all_at_once(executor, 10)
            for measure in (all_at_once, one_by_one):
                milliseconds = measure(executor, options.pieces)
                print(f"{name:8}{measure.__name__:14}{milliseconds:8.3f} ms per empty piece")


if __name__ == "__main__":
    main()
