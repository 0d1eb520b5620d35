"""FW-SVD: the weighted decomposition equals the paper's formula and is optimal under Fisher information."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.compression import importance
from jobs.compression.low_rank import terms_of
from jobs.context import Context
from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.fw_svd import FwSvd, scales
from jobs.techniques.svd import Svd


def make_tokens() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def make_context() -> Context:
    return Context(Statistics(None, "key"), Path(), 0, calibration=make_tokens())


def product(model: Model, name: str) -> Tensor:
    u, v = (model.module.get_submodule(f"{name}.{part}").weight.double() for part in "uv")
    return u @ v


def test_with_equal_information_for_all_weights_the_result_equals_svd(tiny_llama: Path) -> None:
    weighted_context = make_context()
    linears = loading.load(tiny_llama).linears()
    constant = {name: torch.full(layer.weight.shape, 0.25) for name, layer in linears.items()}
    weighted_context.statistics.stored("fisher", lambda: (constant, {}))
    weighted = FwSvd(keep=0.5).compress(loading.load(tiny_llama), weighted_context)
    plain = Svd(keep=0.5).compress(loading.load(tiny_llama), make_context())
    for name in linears:
        weighted_product, plain_product = product(weighted, name), product(plain, name)
        assert (weighted_product - plain_product).norm() < 0.01 * plain_product.norm()


def test_the_factors_equal_the_papers_formula(tiny_llama: Path) -> None:
    shared_context = make_context()
    compressed = FwSvd(keep=0.5).compress(loading.load(tiny_llama), shared_context)
    fisher = importance.fisher(loading.load(tiny_llama), shared_context)
    for name, layer in loading.load(tiny_llama).linears().items():
        # The paper computes x W with W of shape [in, out] and weights its rows.
        w = layer.weight.detach().double().T
        rank = int(0.5 * w.numel() / sum(w.shape))
        weights = torch.diag(fisher[name].double().T.sum(dim=1).sqrt())
        u, s, v = torch.linalg.svd(weights @ w, full_matrices=False)
        paper = torch.linalg.inv(weights) @ (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (product(compressed, name).T - paper).norm() < 0.02 * paper.norm()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 7))
def test_no_matrix_of_that_rank_has_a_smaller_weighted_error(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 8, generator=generator)
    columns = torch.rand(8, generator=generator) ** 4
    fisher = columns.expand(10, 8) / 10
    assert torch.allclose(scales(fisher).square(), columns, atol=1e-6)
    u, v, values = terms_of(weight, scales(fisher))
    plain_u, plain_v, _ = terms_of(weight, torch.ones(8))

    def weighted_error(u: Tensor, v: Tensor) -> float:
        return ((weight - u[:, :rank] @ v[:rank]).square() * columns).sum().item()

    assert weighted_error(u, v) <= weighted_error(plain_u, plain_v) * 1.001 + 1e-6
    assert weighted_error(u, v) == pytest.approx(values[rank:].square().sum().item(), rel=1e-2, abs=1e-6)


def test_the_error_falls_as_the_rank_rises(tiny_llama: Path) -> None:
    shared_context = make_context()
    fisher = importance.fisher(loading.load(tiny_llama), shared_context)
    name = "model.layers.1.mlp.up_proj"
    weight = loading.load(tiny_llama).linears()[name].weight.detach()
    errors = []
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        approximation = product(FwSvd(keep=keep).compress(loading.load(tiny_llama), shared_context), name)
        errors.append(((weight - approximation).square() * scales(fisher[name]).square()).sum().item())
    assert errors == sorted(errors, reverse=True)


def test_global_ranks_use_the_predicted_size(tiny_llama: Path) -> None:
    step = FwSvd(keep=0.5, allocation="global")
    layout = step.compress(loading.load(tiny_llama), make_context()).layout()
    predicted = step.output_layout(loading.original_layout(tiny_llama))
    assert layout.linears.keys() == predicted.linears.keys()
    predicted_bytes = sum(tensor.size_bytes for tensor in predicted.tensors().values())
    actual_bytes = sum(tensor.size_bytes for tensor in layout.tensors().values())
    assert 0.97 * predicted_bytes <= actual_bytes <= predicted_bytes
