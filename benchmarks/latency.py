"""Two models timed against each other, and how much of the machine's memory bandwidth decoding reaches.

Run from the repository's root, on a machine that does nothing else:
    python -m benchmarks.latency --runtime torch --steps "prune_ffn ratio=0.5, rtn bits=4 group=64"
The first is the original as the runtime `--beside` runs it (the same, unless another is named), the second what
`--steps` make of it. Weights are arbitrary: time goes by shapes. They take turns
(see jobs/measurement/paired_timing.py), so the ratio is
that of one machine at one time. The bandwidth is what as many threads reach summing a buffer much larger than
the caches; bytes per token are the weights that one token needs, so the share says how near decoding is to the bound
that reading them sets.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shapes import DECODER, materials_for, outlined, shipped, steps_of
from jobs import formats, runtimes
from jobs.materials import Target
from jobs.measure import environment
from jobs.measurement import machine
from jobs.measurement.paired_timing import time_pair
from jobs.measurement.timing import request_of
from jobs.models import loading, sources
from jobs.models.layout import Layout

BUFFER_BYTES = 2**29


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DECODER)
    parser.add_argument("--runtime", default="torch", choices=runtimes.names())
    parser.add_argument("--beside", choices=runtimes.names(), help="the first's runtime")
    parser.add_argument("--steps", default="", help="what the second is made by")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6)
    given = parser.parse_args()
    original = sources.locate(given.model)
    whole = loading.original_layout(original)
    sides = [(given.beside or given.runtime, whole), (given.runtime, outlined(whole, steps_of(given.steps)))]
    targets = [Target(name, given.threads, given.prompt_tokens, given.new_tokens) for name, _ in sides]
    print(", ".join(f"{name} {value}" for name, value in environment(targets[1]).items()))
    before = bandwidth(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [shipped(layout, original, name, Path(scratch)) for name, layout in sides]
        first, second = (
            request_of(materials_for(given.model, target), original, folder)
            for target, folder in zip(targets, folders, strict=True)
        )
        found = time_pair(first, second, given.pairs)
        read = [
            bytes_per_token(layout, folder, name)
            for (name, layout), folder in zip(sides, folders, strict=True)
        ]
    reached = max(before, bandwidth(given.threads))
    print(f"memory bandwidth, {given.threads} threads: {reached / 1e9:.1f} GB/s")
    for name, milliseconds, size in zip(
        ("first", "second"), (found.first_ms, found.second_ms), read, strict=True
    ):
        for part, values in milliseconds.items():
            print(f"{name} {part}: {np.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})")
        if "decode" in milliseconds:
            rate = size / (float(np.median(milliseconds["decode"])) / 1000)
            print(f"{name} reads {size / 1e6:.1f} MB a token: {rate / reached:.0%} of the bandwidth")
    for part, ratio in found.ratios.items():
        print(
            f"{part}: second ÷ first {ratio.ratio:.3f}, {ratio.low:.3f} to {ratio.high:.3f} "
            f"({ratio.confidence:.0%} of {given.pairs} pairs); {1 / ratio.ratio:.2f}× as fast"
        )


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read, the best of some rounds, in a new process pinned as timings are."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_bandwidth, threads).result()


def _bandwidth(threads: int) -> float:
    machine.pin_threads(machine.processors()[:threads])
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(BUFFER_BYTES // 4)
    best = 0.0
    for _ in range(8):
        for read in (torch.sum, lambda x: torch.dot(x, x)):
            began = time.perf_counter()
            read(buffer)
            best = max(best, BUFFER_BYTES / (time.perf_counter() - began))
    return best


def bytes_per_token(layout: Layout, folder: Path, runtime: str) -> int:
    """Of the weights that one token needs: all but an embedding that is not the head as well. `torch` holds every
    weight in two bytes, the other runtimes as they are shipped."""
    looked_up = next(iter(layout.tables.values())) if len(layout.tables) > 1 else None
    if runtimes.load(runtime).FORMAT == formats.NATIVE:
        unread = 0 if looked_up is None else looked_up.out_features * looked_up.in_features
        return 2 * (layout.parameters() - unread)
    unread = 0 if looked_up is None else sum(one.size_bytes for one in looked_up.tensors().values())
    return formats.size_of(folder, runtimes.load(runtime).FORMAT) - unread


if __name__ == "__main__":
    main()
