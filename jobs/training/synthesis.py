"""Training text that a model generates, and the selection of the rows that are good enough to learn from."""

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
"""Sequences that are generated in one batch."""
_RUN_TOKENS = 8
"""Tokens of the runs by which repetitions are detected."""
_MAX_REPEATED = 0.5
"""A row is a repetition if more than this share of its runs appeared before."""


@dataclass(frozen=True)
class Sampling:
    """The settings of a generation."""

    samples: int
    """Rows."""
    tokens: int
    """Tokens per row."""
    temperature: float
    top_p: float
    """Each token is drawn from the smallest set of tokens whose probabilities reach this sum."""


@dataclass(frozen=True)
class GeneratedRows:
    """Generated rows with the model's own judgement."""

    rows: Int[Tensor, "samples tokens"]
    log_perplexity: Float[Tensor, " samples"]
    """The mean of −log p over all tokens of a row but the first, at temperature 1."""


@dataclass(frozen=True)
class FilteredRows:
    """The selected rows, and the numbers of rejected ones by reason."""

    rows: Int[Tensor, "selected tokens"]
    repeated: int
    too_likely: int
    too_unlikely: int


@torch.no_grad()
def generate_rows(model: Model, sampling: Sampling, seed: int, report: Report) -> GeneratedRows:
    """Let a decoder generate rows of equal length.

    The first token is drawn uniformly from all tokens that are not special, the others from the model's distribution
    (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 3.1, without its few greedy tokens at the start). If the model
    ends a text, it continues with the next, as windows of real text do. Special tokens are never first, since windows
    of text do not start with them either.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tokenizers.load_tokenizer(model.folder)
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    if not ordinary:
        raise ValueError("the teacher's tokenizer has no token to start a text with")
    drawn = torch.randint(len(ordinary), (sampling.samples,), generator=generator)
    first = torch.tensor(ordinary)[drawn]
    rows, log_perplexities = [], []
    for start in range(0, sampling.samples, _ROWS):
        report(start / sampling.samples, "the teacher generates text")
        batch, log_perplexity = _continue(model, first[start : start + _ROWS], sampling, generator)
        rows.append(batch)
        log_perplexities.append(log_perplexity)
    return GeneratedRows(torch.cat(rows), torch.cat(log_perplexities))


def _continue(
    model: Model,
    first: Int[Tensor, " rows"],
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "rows tokens"], Float[Tensor, " rows"]]:
    module = cast(Any, model.module)
    """Return rows that continue these first tokens, and their log-perplexities."""
    tokens = [first.unsqueeze(1)]
    negative_logs = torch.zeros(len(first))
    cache: Any = None
    cache_name = loading.cache_name(model.module)
    for _ in range(sampling.tokens - 1):
        output = module(tokens[-1].to(model.device), use_cache=True, **{cache_name: cache})
        cache = output[cache_name]
        logits = output.logits[:, -1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the teacher predicts NaN or infinite logits: it cannot generate text")
        probabilities = nucleus((logits / sampling.temperature).softmax(dim=-1), sampling.top_p)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator))
        negative_logs -= logits.log_softmax(dim=-1).gather(1, tokens[-1]).squeeze(1)
    return torch.cat(tokens, dim=1), negative_logs / (sampling.tokens - 1)


def nucleus(
    probabilities: Float[Tensor, "rows vocabulary"], top_p: float
) -> Float[Tensor, "rows vocabulary"]:
    """Return the distributions without their tails: the fewest most probable tokens whose sum reaches `top_p`.

    Nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751, eq. 2 and 3. The rows are not normalised.
    """
    if top_p >= 1:
        return probabilities
    descending, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    preceding = descending.cumsum(dim=-1) - descending
    return torch.zeros_like(probabilities).scatter(1, indices, descending.masked_fill(preceding >= top_p, 0))


def choose(generated: GeneratedRows, keep: float) -> FilteredRows:
    """Return the rows to learn from: without repetitions, then the share `keep` of the remaining rows.

    A row is a repetition if more than half of its runs of 8 tokens appear in selected earlier rows, or earlier in the
    row itself. The remaining rows are selected by the model's own perplexity, and as many are removed at both ends:
    very likely text is commonplace or a list, very unlikely text makes no sense. At least one row remains. Raises
    ValueError if every row is a repetition.
    """
    unique = _unrepeated(generated.rows)
    if not len(unique):
        raise ValueError(
            f"all {len(generated.rows)} rows that the teacher generated repeat themselves: raise "
            f"sampling_temperature or top_p"
        )
    order = unique[torch.argsort(generated.log_perplexity[unique], stable=True)]
    dropped = len(order) - max(1, round(keep * len(order)))
    low, high = dropped // 2, dropped - dropped // 2
    selected = order[low : len(order) - high].sort().values
    return FilteredRows(generated.rows[selected], len(generated.rows) - len(unique), low, high)


def _unrepeated(rows: Int[Tensor, "samples tokens"]) -> Int[Tensor, " unique"]:
    """Return the numbers of the rows that repeat neither an earlier selected row nor themselves."""
    known_runs: set[tuple[int, ...]] = set()
    unique = []
    for number, row in enumerate(rows.tolist()):
        length = min(_RUN_TOKENS, len(row))
        runs = [tuple(row[start : start + length]) for start in range(len(row) - length + 1)]
        new_runs = set(runs) - known_runs
        if len(new_runs) < (1 - _MAX_REPEATED) * len(runs):
            continue
        unique.append(number)
        known_runs |= new_runs
    return torch.tensor(unique, dtype=torch.int64)
