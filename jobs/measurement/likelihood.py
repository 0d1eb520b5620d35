"""Likelihood: how probable a model holds each of several endings of one context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.runtimes import Runner


@torch.inference_mode()
def of_endings(
    runner: Runner, context: Sequence[int], endings: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " endings"], Bool[Tensor, " endings"]]:
    """The log-likelihood (nats) of each ending after the context, all as tokens, and whether the model would
    write just that, always taking the likeliest token.

    Raises FloatingPointError where the model gives no finite ones.
    """
    longest = max(len(ending) for ending in endings)
    # Filled up on the right: what stands after the text cannot change what a causal model says before it.
    rows = np.array([[*context, *ending, *[0] * (longest - len(ending))] for ending in endings])
    logits = torch.from_numpy(runner.answer(rows))[:, -longest - 1 :]
    found, greedy = [], []
    for row, ending in zip(logits, endings, strict=True):
        said, right = torch.log_softmax(row[: len(ending)], dim=-1), torch.tensor(list(ending))
        found.append(said.gather(1, right.unsqueeze(1)).sum())
        greedy.append(said.argmax(dim=-1).equal(right))
    scores = torch.stack(found)
    if not bool(torch.isfinite(scores).all()):
        raise FloatingPointError(f"log-likelihoods came out as {scores.tolist()}: the model diverged")
    return scores, torch.tensor(greedy)
