"""Time two models in turns, and compare the memory traffic of decoding with the machine's bandwidth.

Run from the repository's root, on a machine that does nothing else:
    python -m benchmarks.latency --runtime torch --steps "prune_ffn ratio=0.5, rtn bits=4 group=64"
The first model is the original in the runtime `--beside` (default: `--runtime`), the second is the original after
`--steps`. Weights are arbitrary, because latency depends on shapes alone. The models are timed in turns
(jobs/measurement/paired_timing.py), so a drift of the machine's speed cancels in the ratio. The bandwidth is measured
by summing a buffer much larger than the caches with the same number of threads. Bytes per token are the weights that
one token needs, so the printed share compares decoding with the bound set by reading them.
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
    parser.add_argument("--beside", choices=runtimes.names(), help="runtime of the first model")
    parser.add_argument("--steps", default="", help="steps that make the second model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6)
    options = parser.parse_args()
    original = sources.locate(options.model)
    whole = loading.original_layout(original)
    sides = [
        (options.beside or options.runtime, whole),
        (options.runtime, outlined(whole, steps_of(options.steps))),
    ]
    targets = [Target(name, options.threads, options.prompt_tokens, options.new_tokens) for name, _ in sides]
    print(", ".join(f"{name} {value}" for name, value in environment(targets[1]).items()))
    first_bandwidth = bandwidth(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [shipped(layout, original, name, Path(scratch)) for name, layout in sides]
        first, second = (
            request_of(materials_for(options.model, target), original, folder)
            for target, folder in zip(targets, folders, strict=True)
        )
        timings = time_pair(first, second, options.pairs)
        read = [
            bytes_per_token(layout, folder, name)
            for (name, layout), folder in zip(sides, folders, strict=True)
        ]
    reached = max(first_bandwidth, bandwidth(options.threads))
    print(f"memory bandwidth, {options.threads} threads: {reached / 1e9:.1f} GB/s")
    for name, milliseconds, size in zip(
        ("first", "second"), (timings.first_ms, timings.second_ms), read, strict=True
    ):
        for part, values in milliseconds.items():
            print(f"{name} {part}: {np.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})")
        if "decode" in milliseconds:
            rate = size / (float(np.median(milliseconds["decode"])) / 1000)
            print(f"{name} reads {size / 1e6:.1f} MB a token: {rate / reached:.0%} of the bandwidth")
    for part, ratio in timings.ratios.items():
        print(
            f"{part}: second ÷ first {ratio.ratio:.3f}, {ratio.low:.3f} to {ratio.high:.3f} "
            f"({ratio.confidence:.0%} of {options.pairs} pairs); {1 / ratio.ratio:.2f}× as fast"
        )


def bandwidth(threads: int) -> float:
    """Return the bytes per second that `threads` read, the best of several rounds in a new process.

    The process is pinned as timings are.
    """
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
    """Return the size of the weights that one token needs: all except an untied embedding.

    `torch` stores every weight in two bytes, the other runtimes in the shipped format.
    """
    format = runtimes.load(runtime).FORMAT
    embedding = None
    if len(layout.tables) > 1:
        embedding = next(iter(layout.tables.values()))
    if format == formats.NATIVE:
        parameters = layout.parameters()
        if embedding is not None:
            parameters -= embedding.out_features * embedding.in_features
        return 2 * parameters
    size = formats.size_of(folder, format)
    if embedding is not None:
        size -= sum(tensor.size_bytes for tensor in embedding.tensors().values())
    return size


if __name__ == "__main__":
    main()
