"""Synthesis: text that a model writes itself, and which of it is good enough to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.models import loading, tokenizers
from jobs.models.model import Model
from jobs.progress import Report

_ROWS = 8
"""Sequences written side by side."""
_GRAM = 8
"""Tokens of the runs by which two texts are found to repeat each other."""
_SHARED = 0.5
"""A text is a repetition if more of its runs than this share were written before."""


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token: from the distribution at `temperature`, cut to the fewest tokens whose
    probabilities reach `top_p`."""

    samples: int
    tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class GeneratedRows:
    """rows: what was written. surprise: of each row, the mean over its tokens but the first of −log p, by the
    writer itself at temperature 1: the logarithm of its perplexity."""

    rows: Int[Tensor, "samples tokens"]
    surprise: Float[Tensor, " samples"]


@dataclass(frozen=True)
class FilteredRows:
    """rows: what is kept. The counts say why the others are not."""

    rows: Int[Tensor, "kept tokens"]
    repeated: int
    too_likely: int
    too_unlikely: int


@torch.no_grad()
def write(model: Model, sampling: Sampling, seed: int, report: Report) -> GeneratedRows:
    """Let a decoder write rows of `tokens` tokens each.

    The first token is drawn evenly from all that are no special ones, the others from the model's own
    distribution (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 3.1, without its few greedy tokens at the
    start). Where the model ends a text it goes on with the next, as windows of real text do. Special tokens
    at the start are left out: windows of text have none either.
    """
    generator = torch.Generator().manual_seed(seed)
    words = tokenizers.load_tokenizer(model.folder)
    special = set(words.all_special_ids)
    usual = [token for token in sorted(words.get_vocab().values()) if token not in special]
    if not usual:
        raise ValueError("the teacher's tokenizer has no token to start a text with")
    drawn = torch.randint(len(usual), (sampling.samples,), generator=generator)
    first = torch.tensor(usual)[drawn]
    rows, surprise = [], []
    for start in range(0, sampling.samples, _ROWS):
        report(start / sampling.samples, "the teacher writes")
        row, surprising = _continue(model, first[start : start + _ROWS], sampling, generator)
        rows.append(row)
        surprise.append(surprising)
    return GeneratedRows(torch.cat(rows), torch.cat(surprise))


def _continue(
    model: Model,
    first: Int[Tensor, " rows"],
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "rows tokens"], Float[Tensor, " rows"]]:
    module = cast(Any, model.module)
    written = [first.unsqueeze(1)]
    surprise = torch.zeros(len(first))
    cache: Any = None
    cache_name = loading.cache_name(model.module)
    for _ in range(sampling.tokens - 1):
        said = module(written[-1].to(model.device), use_cache=True, **{cache_name: cache})
        cache = said[cache_name]
        logits = said.logits[:, -1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the teacher predicts NaN or infinite logits: it cannot write")
        shares = narrowed((logits / sampling.temperature).softmax(dim=-1), sampling.top_p)
        written.append(torch.multinomial(shares, 1, generator=generator))
        surprise -= logits.log_softmax(dim=-1).gather(1, written[-1]).squeeze(1)
    return torch.cat(written, dim=1), surprise / (sampling.tokens - 1)


def narrowed(shares: Float[Tensor, "rows vocabulary"], top_p: float) -> Float[Tensor, "rows vocabulary"]:
    """The distributions without their tails: of the most probable tokens, the fewest that reach `top_p` together
    (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751, eq. 2 and 3). Rows need not add up to 1."""
    if top_p >= 1:
        return shares
    most, places = shares.sort(dim=-1, descending=True, stable=True)
    before = most.cumsum(dim=-1) - most
    return torch.zeros_like(shares).scatter(1, places, most.masked_fill(before >= top_p, 0))


def choose(written: GeneratedRows, keep: float) -> FilteredRows:
    """The rows to learn from: first without repetitions, then the share `keep` of what is left.

    A row is a repetition if more than half of its runs of 8 tokens stand in rows that were kept before it, or
    if it repeats itself: if more than half of its runs stood in it already. Of the rest the writer's own
    perplexity decides, and both tails go alike: text that it finds too likely is commonplace or a list, text
    that it finds too unlikely has gone astray. At least one row stays.
    Raises ValueError where everything is repetition.
    """
    unique = _unrepeated(written.rows)
    if not len(unique):
        raise ValueError(
            f"all {len(written.rows)} rows that the teacher wrote repeat themselves: raise "
            f"sampling_temperature or top_p"
        )
    order = unique[torch.argsort(written.surprise[unique], stable=True)]
    dropped = len(order) - max(1, round(keep * len(order)))
    low, high = dropped // 2, dropped - dropped // 2
    kept = order[low : len(order) - high].sort().values
    return FilteredRows(written.rows[kept], len(written.rows) - len(unique), low, high)


def _unrepeated(rows: Int[Tensor, "samples tokens"]) -> Int[Tensor, " unique"]:
    """The numbers of the rows that repeat neither an earlier one that stays nor themselves."""
    seen: set[tuple[int, ...]] = set()
    unique = []
    for number, row in enumerate(rows.tolist()):
        length = min(_GRAM, len(row))
        runs = [tuple(row[start : start + length]) for start in range(len(row) - length + 1)]
        fresh = set(runs) - seen
        if len(fresh) < (1 - _SHARED) * len(runs):
            continue
        unique.append(number)
        seen |= fresh
    return torch.tensor(unique, dtype=torch.int64)
