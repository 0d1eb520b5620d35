"""The log-likelihood of several endings of one context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.runtimes import Runner


@torch.inference_mode()
def log_likelihoods(
    runner: Runner, context: Sequence[int], endings: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " endings"], Bool[Tensor, " endings"]]:
    """Return the log-likelihood (nats) of each ending after the context, and whether greedy decoding would give it.

    Contexts and endings are token ids. Raises FloatingPointError if a log-likelihood is not finite.
    """
    longest = max(len(ending) for ending in endings)
    # Padded on the right: later tokens cannot change the earlier logits of a causal model.
    rows = np.array([[*context, *ending, *[0] * (longest - len(ending))] for ending in endings])
    logits = torch.from_numpy(runner.answer(rows))[:, -longest - 1 :]
    likelihoods, greedy = [], []
    for row, ending in zip(logits, endings, strict=True):
        log_probabilities = torch.log_softmax(row[: len(ending)], dim=-1)
        targets = torch.tensor(list(ending))
        likelihoods.append(log_probabilities.gather(1, targets.unsqueeze(1)).sum())
        greedy.append(log_probabilities.argmax(dim=-1).equal(targets))
    scores = torch.stack(likelihoods)
    if not bool(torch.isfinite(scores).all()):
        raise FloatingPointError(f"log-likelihoods came out as {scores.tolist()}: the model diverged")
    return scores, torch.tensor(greedy)
