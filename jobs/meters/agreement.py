"""How close the artifact's sentence vectors are to the original's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject, run_meter
from jobs.models import loading
from jobs.runtimes import Runner, on_torch

_TOKENS_AT_ONCE = 1024


def measure(subject: Subject) -> Measurement:
    """agreement: the mean cosine between the vectors that artifact and original give the same evaluation
    window, each the mean of its last hidden states. The original runs in torch, whatever the target; there it
    agrees with itself by exactly 1. The error is the standard error over windows."""
    rows = subject.evaluation()
    at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])

    def observe(start: int) -> list[Tensor]:
        left = rows[start:]
        theirs = original_vectors(subject.original, left)
        return [nn.functional.cosine_similarity(vectors(subject.runner, left), theirs)]

    (cosines,) = subject.observed(("agreement",), len(rows), observe, at_once)
    return run_meter({"agreement": cosines})


@dataclass(frozen=True)
class _Asked:
    """Equal where the vectors are: for the same files, windows and threads, by which sums are rounded otherwise."""

    files: tuple[loading.FileState, ...]
    windows: str
    threads: int
    original: Path = field(compare=False)
    rows: Int[Tensor, "windows tokens"] = field(compare=False)


def original_vectors(original: Path, rows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows width"]:
    """The original's vectors, remembered for as long as the process lives: every candidate is compared with them.

    The tensor is shared: it must not be changed.
    """
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return _said(_Asked(loading.file_states(original), digest, torch.get_num_threads(), original, rows))


@lru_cache(maxsize=8)
def _said(asked: _Asked) -> Float[Tensor, "windows width"]:
    return vectors(on_torch.start(asked.original, asked.threads), asked.rows)


@torch.inference_mode()
def vectors(runner: Runner, rows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows width"]:
    """One vector per window, in fp32."""
    batches = torch.split(rows, max(1, _TOKENS_AT_ONCE // rows.shape[1]))
    return torch.cat([torch.from_numpy(runner.answer(batch.numpy())).mean(dim=1) for batch in batches])


METER = Meter(metrics=("agreement",), tasks=("embedding",), measure=measure, reads="evaluation")
