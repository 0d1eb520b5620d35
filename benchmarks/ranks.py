"""Measure the time of a first factorization of the decoder, and of a second one with another rank.

Run from the repository's root: python -m benchmarks.ranks [--blocks N] [--only NAME]
It needs the packages and data of benchmarks.techniques. The first time includes the statistics of the calibration and
one decomposition per linear. The claim is that another rank costs less than 2 % of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from torch import nn

from benchmarks.techniques import DECODER, context_for, texts
from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading, sources
from jobs.models.model import Model

TECHNIQUES = ("svd", "asvd", "svd_llm", "fw_svd")
CLAIM = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30, help="use the model's first blocks only")
    parser.add_argument("--only", choices=TECHNIQUES)
    options = parser.parse_args()
    folder, materials = sources.locate(DECODER), texts(False, True)
    print("| technique | first, s | second, s | share |\n|---|---|---|---|")
    holds = True
    for name in (options.only,) if options.only else TECHNIQUES:
        with tempfile.TemporaryDirectory() as scratch:
            context = context_for(materials, folder, Statistics(Path(scratch), "parent"), Path(scratch))
            first = seconds(name, 0.8, shortened(loading.load(folder), options.blocks), context)
            # New statistics that read the files, as in another worker.
            context = context_for(materials, folder, Statistics(Path(scratch), "parent"), Path(scratch))
            second = seconds(name, 0.6, shortened(loading.load(folder), options.blocks), context)
        holds &= second < CLAIM * first
        print(f"| {name} | {first:.1f} | {second:.2f} | {second / first:.2%} |", flush=True)
    print(f"another rank costs under {CLAIM:.0%}: {holds}")
    return 0 if holds else 1


def seconds(name: str, keep: float, model: Model, context: Context) -> float:
    """Factorize `model` in place and return the seconds."""
    start = time.perf_counter()
    techniques.load(name).of({"keep": keep}).compress(model, context)
    return time.perf_counter() - start


def shortened(model: Model, blocks: int) -> Model:
    """Remove all but the first blocks of the model, in place, and return it."""
    first = nn.ModuleList(list(model.blocks)[:blocks])
    model.replace(model.blocks_name, first)
    model.config.num_hidden_layers = len(first)
    return model


if __name__ == "__main__":
    sys.exit(main())
