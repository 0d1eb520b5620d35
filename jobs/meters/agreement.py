"""How close the artifact's sentence vectors are to the original's."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.job import Measurement
from jobs.meter import Meter, Subject, measured
from jobs.runtimes import Runner, on_torch

_TOKENS_AT_ONCE = 1024


def measure(subject: Subject) -> Measurement:
    """agreement: the mean cosine between the vectors that artifact and original give the same evaluation
    window, each the mean of its last hidden states. The original runs in torch, whatever the target; there it
    agrees with itself by exactly 1. The error is the standard error over windows."""
    rows = subject.evaluation()
    original = vectors(on_torch.start(subject.original, torch.get_num_threads()), rows)
    cosines = nn.functional.cosine_similarity(vectors(subject.runner, rows), original)
    return measured({"agreement": cosines})


@torch.inference_mode()
def vectors(runner: Runner, rows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows width"]:
    """One vector per window, in fp32."""
    batches = torch.split(rows, max(1, _TOKENS_AT_ONCE // rows.shape[1]))
    return torch.cat([runner.answer(batch).float().mean(dim=1) for batch in batches])


METER = Meter(metrics=("agreement",), tasks=("embedding",), measure=measure, reads="evaluation")
