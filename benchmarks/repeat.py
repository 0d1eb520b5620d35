"""Whether the same artifact takes the same time again after an hour of other work.

Run from the repository's root, on a machine that does nothing else: python -m benchmarks.repeat [--minutes 60]
With `--elsewhere` something else works in between (another benchmark, say), and this waits for the time to pass.
The claim is that the medians (p50) of ten models agree within 3 %. What is told apart: a machine that got slower
moves all models by one factor; what is left once that is taken out is the noise of measuring.
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
    parser.add_argument("--elsewhere", action="store_true", help="something else works in between")
    given = parser.parse_args()
    target = Target(given.runtime, given.threads)
    print(", ".join(f"{name} {value}" for name, value in environment(target).items()))
    original = sources.locate(given.model)
    shapes = drawn(loading.original_layout(original), given.artifacts, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        requests = [
            request_of(
                materials_for(given.model, target),
                original,
                shipped(layout, original, given.runtime, Path(scratch)),
            )
            for _, layout in shapes
        ]
        before = [timed(request) for request in requests]
        print(f"timed once: {len(before)} models; {given.minutes:g} minutes of other work begin", flush=True)
        (time.sleep if given.elsewhere else work)(60 * given.minutes)
        after = [timed(request) for request in requests]
    changes = []
    print("| model | decode_ms | again | change | quiet |\n|---|---|---|---|---|")
    for (text, _), (one, quiet), (other, still) in zip(shapes, before, after, strict=True):
        changes.append(other / one - 1)
        print(f"| {text} | {one:.2f} | {other:.2f} | {changes[-1]:+.1%} | {quiet and still} |")
    common = float(np.median(changes))
    rest = max(abs(change - common) for change in changes)
    worst = max(map(abs, changes))
    print(f"worst {worst:.1%}; all moved by {common:+.1%}, and each from there by {rest:.1%} at most")
    print(f"agree within {CLAIM:.0%}: {worst <= CLAIM}")
    return 0 if worst <= CLAIM else 1


def timed(request: Request) -> tuple[float, bool]:
    """decode_ms, and whether it is reliable."""
    found = summary(time_quietly(lambda: time_artifact(request)))
    return found.metrics["decode_ms"], "decode_ms" not in found.unreliable


def work(seconds: float) -> None:
    """Compute and rest in turn, as a search does."""
    until = time.monotonic() + seconds
    x = torch.randn(1024, 1024)
    while time.monotonic() < until:
        round_ends = min(until, time.monotonic() + 20)
        while time.monotonic() < round_ends:
            x = torch.nn.functional.normalize(x @ x, dim=1)
        time.sleep(max(0.0, min(5.0, until - time.monotonic())))


if __name__ == "__main__":
    sys.exit(main())
