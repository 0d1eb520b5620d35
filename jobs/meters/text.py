"""Perplexity and next-token accuracy."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel, run_meter
from jobs.runtimes import Runner

_TOKENS_AT_ONCE = 512
"""Tokens of one forward pass: more are not faster, and the logits of a whole vocabulary take much memory."""


def measure(subject: ShippedModel) -> Measurement:
    """Measure perplexity and accuracy: each token is predicted from the tokens before it in its window.

    Standard errors are clustered by window, since tokens of one text are not independent.
    """
    rows = subject.evaluation()
    at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])

    def observe(start: int) -> list[Tensor]:
        scores = [score(subject.runner, batch) for batch in torch.split(rows[start:], at_once)]
        return [torch.cat(parts) for parts in zip(*scores, strict=True)]

    loss, hits = subject.observed(("losses", "accuracy"), len(rows), observe, at_once)
    # The delta method: d exp(x) = exp(x) dx.
    perplexity = loss.mean().exp() * (1 + loss - loss.mean())
    return run_meter({"perplexity": perplexity, "accuracy": hits}, {"losses": loss})


@torch.inference_mode()
def score(
    runner: Runner, rows: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return for each window the mean negative log-likelihood (nats) of its tokens except the first one, and the share
    of them that the model ranks first."""
    logits = torch.from_numpy(runner.answer(rows.numpy()))[:, :-1]
    targets = rows[:, 1:]
    losses = torch.stack(
        [nn.functional.cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)]
    )
    hits = (logits.argmax(dim=-1) == targets).double().mean(dim=1)
    return losses.double(), hits


METER = Meter(metrics=("perplexity", "accuracy"), tasks=("causal-lm",), measure=measure, reads="evaluation")
