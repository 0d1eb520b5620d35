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
def test_no_matrix_of_that_rank_is_nearer_to_the_weight(seed: int, rank: int, out: int, into: int) -> None:
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    u, v, _ = terms_of(weight, torch.ones(into))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert torch.allclose(u[:, :rank].double() @ v[:rank].double(), best, atol=1e-4)


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_the_model_holds_the_truncated_decomposition_of_each_weight(keep: float, tiny_llama: Path) -> None:
    context = Context(Statistics(None, "key"), Path(), 0)
    made = Svd(keep=keep).compress(loading.load(tiny_llama), context)
    for name, layer in loading.load(tiny_llama).linears().items():
        weight = layer.weight.detach().double()
        u, v = (made.module.get_submodule(f"{name}.{part}").weight.double() for part in "uv")
        rank = len(v)
        assert rank == max(1, int(keep * weight.numel() / sum(weight.shape)))
        left, values, right = torch.linalg.svd(weight)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert (u @ v - best).norm() < 0.01 * best.norm()


def test_it_reads_no_text() -> None:
    assert not Svd.needs
