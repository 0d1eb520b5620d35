"""SVD: factors are the truncated decomposition, and no matrix of that rank is closer to the weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.calibration.statistics import Statistics
from jobs.compression.low_rank import terms_of
from jobs.context import Context
from jobs.models import loading
from jobs.techniques.svd import Svd


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 9), out=st.integers(9, 14), into=st.integers(9, 14))
def test_no_matrix_of_that_rank_is_closer_to_the_weight(seed: int, rank: int, out: int, into: int) -> None:
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    u, v, _ = terms_of(weight, torch.ones(into))
    left_vectors, values, right_vectors = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (left_vectors[:, :rank] * values[:rank]) @ right_vectors[:rank]
    assert torch.allclose(u[:, :rank].double() @ v[:rank].double(), best, atol=1e-4)


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_the_model_has_the_truncated_decomposition_of_each_weight(keep: float, tiny_llama: Path) -> None:
    context = Context(Statistics(None, "key"), Path(), 0)
    compressed = Svd(keep=keep).compress(loading.load(tiny_llama), context)
    for name, layer in loading.load(tiny_llama).linears().items():
        weight = layer.weight.detach().double()
        u, v = (compressed.module.get_submodule(f"{name}.{part}").weight.double() for part in "uv")
        rank = len(v)
        assert rank == max(1, int(keep * weight.numel() / sum(weight.shape)))
        left_vectors, values, right_vectors = torch.linalg.svd(weight)
        best = (left_vectors[:, :rank] * values[:rank]) @ right_vectors[:rank]
        assert (u @ v - best).norm() < 0.01 * best.norm()


def test_svd_needs_no_calibration_text() -> None:
    assert not Svd.needs
