"""Repeatability of timings: time the same artifacts again after an hour of other work.

Run from the repository's root, on a machine that does nothing else: python -m benchmarks.repeat [--minutes 60]
With `--elsewhere` this process only waits, and another program, such as a benchmark, supplies the work in between.
The claim is that the medians (p50) of ten models agree within 3 %. Two causes are separated: a slower machine changes
all models by a common factor; the remaining differences are measurement noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import DECODER, drawn, materials_for, shipped
from jobs import runtimes
from jobs.materials import Target
from jobs.measure import environment
from jobs.measurement.stopwatch import Request, time_artifact
from jobs.measurement.timing import request_of, time_quietly
from jobs.meters.latency import summary
from jobs.models import loading, sources

CLAIM = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DECODER)
    parser.add_argument("--runtime", default="torch", choices=runtimes.names())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--artifacts", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=60.0, help="of other work in between")
    parser.add_argument(
        "--elsewhere", action="store_true", help="wait while another program works in between"
    )
    options = parser.parse_args()
    target = Target(options.runtime, options.threads)
    print(", ".join(f"{name} {value}" for name, value in environment(target).items()))
    original = sources.locate(options.model)
    shapes = drawn(loading.original_layout(original), options.artifacts, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        requests = [
            request_of(
                materials_for(options.model, target),
                original,
                shipped(layout, original, options.runtime, Path(scratch)),
            )
            for _, layout in shapes
        ]
        first_timings = [timed(request) for request in requests]
        print(
            f"timed once: {len(first_timings)} models; {options.minutes:g} minutes of other work begin",
            flush=True,
        )
        if options.elsewhere:
            time.sleep(60 * options.minutes)
        else:
            work(60 * options.minutes)
        second_timings = [timed(request) for request in requests]
    changes = []
    print("| model | decode_ms | again | change | quiet |\n|---|---|---|---|---|")
    for (text, _), (first_ms, first_quiet), (second_ms, second_quiet) in zip(
        shapes, first_timings, second_timings, strict=True
    ):
        changes.append(second_ms / first_ms - 1)
        quiet = first_quiet and second_quiet
        print(f"| {text} | {first_ms:.2f} | {second_ms:.2f} | {changes[-1]:+.1%} | {quiet} |")
    common = float(np.median(changes))
    largest_residual = max(abs(change - common) for change in changes)
    worst = max(map(abs, changes))
    print(
        f"worst {worst:.1%}; all moved by {common:+.1%}, and each from there by {largest_residual:.1%} at most"
    )
    print(f"agree within {CLAIM:.0%}: {worst <= CLAIM}")
    if worst <= CLAIM:
        return 0
    return 1


def timed(request: Request) -> tuple[float, bool]:
    """Return decode_ms, and whether it is reliable."""
    measurement = summary(time_quietly(lambda: time_artifact(request)))
    return measurement.metrics["decode_ms"], "decode_ms" not in measurement.unreliable


def work(seconds: float) -> None:
    """Compute and pause in turns, as a search does."""
    until = time.monotonic() + seconds
    x = torch.randn(1024, 1024)
    while time.monotonic() < until:
        round_ends = min(until, time.monotonic() + 20)
        while time.monotonic() < round_ends:
            x = torch.nn.functional.normalize(x @ x, dim=1)
        time.sleep(max(0.0, min(5.0, until - time.monotonic())))


if __name__ == "__main__":
    sys.exit(main())
