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


def tokens() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def context() -> Context:
    return Context(Statistics(None, "key"), Path(), 0, calibration=tokens())


def product(model: Model, name: str) -> Tensor:
    u, v = (model.module.get_submodule(f"{name}.{part}").weight.double() for part in "uv")
    return u @ v


def test_where_all_weights_have_the_same_information_it_is_svd(tiny_llama: Path) -> None:
    given = context()
    linears = loading.load(tiny_llama).linears()
    constant = {name: torch.full(layer.weight.shape, 0.25) for name, layer in linears.items()}
    given.statistics.stored("fisher", lambda: (constant, {}))
    weighted = FwSvd(keep=0.5).compress(loading.load(tiny_llama), given)
    plain = Svd(keep=0.5).compress(loading.load(tiny_llama), context())
    for name in linears:
        one, other = product(weighted, name), product(plain, name)
        assert (one - other).norm() < 0.01 * other.norm()


def test_it_equals_the_papers_formula(tiny_llama: Path) -> None:
    given = context()
    found = FwSvd(keep=0.5).compress(loading.load(tiny_llama), given)
    fisher = importance.fisher(loading.load(tiny_llama), given)
    for name, layer in loading.load(tiny_llama).linears().items():
        # x W with W of [in, out], whose rows are weighed.
        w = layer.weight.detach().double().T
        rank = int(0.5 * w.numel() / sum(w.shape))
        weights = torch.diag(fisher[name].double().T.sum(dim=1).sqrt())
        u, s, v = torch.linalg.svd(weights @ w, full_matrices=False)
        paper = torch.linalg.inv(weights) @ (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (product(found, name).T - paper).norm() < 0.02 * paper.norm()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 7))
def test_no_matrix_of_that_rank_is_nearer_where_inputs_differ_in_information(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 8, generator=generator)
    columns = torch.rand(8, generator=generator) ** 4
    fisher = columns.expand(10, 8) / 10
    assert torch.allclose(scales(fisher).square(), columns, atol=1e-6)
    u, v, values = terms_of(weight, scales(fisher))
    plain_u, plain_v, _ = terms_of(weight, torch.ones(8))

    def lost(u: Tensor, v: Tensor) -> float:
        return ((weight - u[:, :rank] @ v[:rank]).square() * columns).sum().item()

    assert lost(u, v) <= lost(plain_u, plain_v) * 1.001 + 1e-6
    assert lost(u, v) == pytest.approx(values[rank:].square().sum().item(), rel=1e-2, abs=1e-6)


def test_the_error_falls_as_the_rank_rises(tiny_llama: Path) -> None:
    given = context()
    fisher = importance.fisher(loading.load(tiny_llama), given)
    name = "model.layers.1.mlp.up_proj"
    weight = loading.load(tiny_llama).linears()[name].weight.detach()
    errors = []
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        found = product(FwSvd(keep=keep).compress(loading.load(tiny_llama), given), name)
        errors.append(((weight - found).square() * scales(fisher[name]).square()).sum().item())
    assert errors == sorted(errors, reverse=True)


def test_ranks_from_one_budget_spend_what_was_foretold(tiny_llama: Path) -> None:
    step = FwSvd(keep=0.5, allocation="global")
    made = step.compress(loading.load(tiny_llama), context()).layout()
    foretold = step.output_layout(loading.original_layout(tiny_llama))
    assert made.linears.keys() == foretold.linears.keys()
    held, told = (sum(t.size_bytes for t in layout.tensors().values()) for layout in (made, foretold))
    assert 0.97 * told <= held <= told
