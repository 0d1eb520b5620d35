"""Agreement of an encoder's sentence vectors with the original's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel, run_meter
from jobs.models import loading
from jobs.runtimes import Runner, on_torch

_TOKENS_AT_ONCE = 1024
"""Tokens of one forward pass."""


def measure(subject: ShippedModel) -> Measurement:
    """Measure agreement: the mean cosine similarity of the artifact's and the original's vectors of the same window.

    A vector is the mean of the last hidden states. The original runs in torch for every target, where its agreement
    with itself is exactly 1. The error is the standard error over windows.
    """
    rows = subject.evaluation()
    at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])

    def observe(start: int) -> list[Tensor]:
        windows = rows[start:]
        original = original_vectors(subject.original, windows)
        return [nn.functional.cosine_similarity(vectors(subject.runner, windows), original)]

    (cosines,) = subject.observed(("agreement",), len(rows), observe, at_once)
    return run_meter({"agreement": cosines})


@dataclass(frozen=True)
class _VectorsKey:
    """Equal for equal vectors: same files, windows and threads (their number changes the rounding of sums)."""

    files: tuple[loading.FileState, ...]
    windows: str
    threads: int
    original: Path = field(compare=False)
    rows: Int[Tensor, "windows tokens"] = field(compare=False)


def original_vectors(original: Path, rows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows width"]:
    """Return the original's vectors, cached in this process since every candidate is compared with them.

    The tensor is shared: do not change it.
    """
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return _cached_vectors(
        _VectorsKey(loading.file_states(original), digest, torch.get_num_threads(), original, rows)
    )


@lru_cache(maxsize=8)
def _cached_vectors(key: _VectorsKey) -> Float[Tensor, "windows width"]:
    return vectors(on_torch.start(key.original, key.threads), key.rows)


@torch.inference_mode()
def vectors(runner: Runner, rows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows width"]:
    """Return one fp32 vector per window."""
    batches = torch.split(rows, max(1, _TOKENS_AT_ONCE // rows.shape[1]))
    return torch.cat([torch.from_numpy(runner.answer(batch.numpy())).mean(dim=1) for batch in batches])


METER = Meter(metrics=("agreement",), tasks=("embedding",), measure=measure, reads="evaluation")
