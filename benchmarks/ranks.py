"""How long a factorization takes the first time, and how long another rank takes after it, on the decoder.

Run from the repository's root: python -m benchmarks.ranks [--blocks N] [--only NAME]
Needs what benchmarks.techniques needs. The first time has the calibration's statistics and one decomposition
per linear in it; the claim is that another rank costs less than 2 % of that.
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
    parser.add_argument("--blocks", type=int, default=30, help="of the model's; the rest are left out")
    parser.add_argument("--only", choices=TECHNIQUES)
    given = parser.parse_args()
    folder, materials = sources.locate(DECODER), texts(False, True)
    print("| technique | first, s | second, s | share |\n|---|---|---|---|")
    held = True
    for name in (given.only,) if given.only else TECHNIQUES:
        with tempfile.TemporaryDirectory() as scratch:
            context = context_for(materials, folder, Statistics(Path(scratch), "parent"), Path(scratch))
            first = seconds(name, 0.8, shortened(loading.load(folder), given.blocks), context)
            # Statistics anew, as another worker has them: from the files.
            context = context_for(materials, folder, Statistics(Path(scratch), "parent"), Path(scratch))
            second = seconds(name, 0.6, shortened(loading.load(folder), given.blocks), context)
        held &= second < CLAIM * first
        print(f"| {name} | {first:.1f} | {second:.2f} | {second / first:.2%} |", flush=True)
    print(f"another rank costs under {CLAIM:.0%}: {held}")
    return 0 if held else 1


def seconds(name: str, keep: float, model: Model, context: Context) -> float:
    """Of factorizing `model`, in place."""
    started = time.perf_counter()
    techniques.load(name).of({"keep": keep}).compress(model, context)
    return time.perf_counter() - started


def shortened(model: Model, blocks: int) -> Model:
    """The model with its first blocks only, in place."""
    kept = nn.ModuleList(list(model.blocks)[:blocks])
    model.replace(model.blocks_name, kept)
    model.config.num_hidden_layers = len(kept)
    return model


if __name__ == "__main__":
    sys.exit(main())
