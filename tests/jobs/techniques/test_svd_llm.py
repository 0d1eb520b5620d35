from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.compression.low_rank import root_of, terms_of
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.model import Model
from jobs.techniques.svd_llm import SvdLlm, updated
from tests.conftest import Tiny


def case(seed: int, out: int = 12, into: int = 9, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, into, generator=generator) @ torch.randn(into, into, generator=generator)
    return torch.randn(out, into, generator=generator), x, x.T @ x / tokens


def factors(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, v, _ = terms_of(weight, root_of(gram).float())
    return u[:, :rank], v[:rank]


def approximated(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    u, v = factors(weight, gram, rank)
    return u @ v


def loss(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return (x @ (weight - other).T).norm().item()


@pytest.mark.parametrize(("out", "into"), [(12, 9), (9, 12), (7, 7)])
def test_full_rank_is_the_identity(out: int, into: int) -> None:
    weight, _, gram = case(0, out, into)
    assert torch.allclose(approximated(weight, gram, min(out, into)), weight, atol=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_matrix_of_that_rank_is_nearer_on_the_inputs(seed: int, rank: int) -> None:
    weight, x, gram = case(seed)
    ours = loss(weight, approximated(weight, gram, rank), x)
    # Eckart and Young: the error is the energy of the singular values left out. What is left at nearly full
    # rank may be smaller than what the Gram matrix's own rounding to fp32 hides, the root of its epsilon.
    values = terms_of(weight, root_of(gram).float())[2]
    rounding = 4e-4 * loss(weight, torch.zeros_like(weight), x)
    assert ours == pytest.approx(values[rank:].norm().item() * 200**0.5, rel=1e-2, abs=rounding)
    u, v, _ = terms_of(weight, torch.ones(9))
    assert ours <= loss(weight, u[:, :rank] @ v[:rank], x) * 1.001 + rounding
    u, v, _ = terms_of(weight, gram.diagonal() ** 0.25)
    assert ours <= loss(weight, u[:, :rank] @ v[:rank], x) * 1.001 + rounding


def test_it_equals_the_papers_formula() -> None:
    weight, _, gram = case(1)
    root = torch.linalg.cholesky(gram.double())
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    paper = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    assert torch.allclose(approximated(weight, gram, 4).double(), paper, atol=1e-3)


def test_a_singular_gram_matrix_does_no_harm() -> None:
    weight, x, _ = case(2, tokens=4)  # fewer tokens than inputs
    gram = x.T @ x / 4
    assert loss(weight, approximated(weight, gram, 4), x) < 1e-3
    assert torch.isfinite(approximated(weight, torch.zeros_like(gram), 3)).all()
    assert torch.isfinite(approximated(torch.zeros_like(weight), gram, 3)).all()


# The update


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_the_update_is_least_squares_and_never_worse_on_its_inputs(seed: int, rank: int) -> None:
    weight, _, gram = case(seed)
    _, other, seen = case(seed + 5000)
    u, v = factors(weight, gram, rank)
    better = updated(weight, u, v, seen)
    before, after = loss(weight, u @ v, other), loss(weight, better @ v, other)
    assert after <= before + 1e-5 * loss(weight, torch.zeros_like(weight), other)
    # The ridge as rows of their own: targets u, inputs of the ridge's root.
    hidden = (other @ v.T).double() / len(other) ** 0.5
    ridge = (1e-4 * hidden.square().sum(dim=0).mean()).sqrt() * torch.eye(rank).double()
    rows = torch.cat([hidden, ridge])
    targets = torch.cat([(other @ weight.T).double() / len(other) ** 0.5, ridge @ u.T.double()])
    solved = torch.linalg.lstsq(rows, targets).solution.T
    assert torch.allclose(better.double(), solved, rtol=1e-3, atol=1e-3)


def test_with_the_inputs_of_the_decomposition_nothing_is_left_to_update() -> None:
    weight, _, gram = case(3)
    u, v = factors(weight, gram, 4)
    assert torch.allclose(updated(weight, u, v, gram), u, atol=1e-4)


def test_where_the_inputs_tell_nothing_u_stays() -> None:
    weight, _, gram = case(4)
    u, v = factors(weight, gram, 4)
    assert torch.equal(updated(weight, u, v, torch.zeros_like(gram)), u)
    one = torch.zeros_like(gram)
    one[2, 2] = 1.0  # a single input is ever seen
    found = updated(weight, u, v, one)
    assert torch.isfinite(found).all()
    assert loss(weight, found @ v, torch.eye(9)[2:3]) < 0.05 * loss(weight, u @ v, torch.eye(9)[2:3])


def text() -> Tensor:
    return torch.randint(3, 512, (16, 32), generator=torch.Generator().manual_seed(0))


def made(original: Path, update: str, allocation: str = "uniform") -> Model:
    context = Context(Statistics(None, "key"), Path(), 0, calibration=text())
    step = SvdLlm(keep=0.4, update=update, allocation=allocation)
    model = step.compress(loading.load(original), context)
    assert step.exact == (allocation == "uniform")
    if step.exact:
        assert model.layout() == step.output_layout(loading.original_layout(original))
    return model


def read_by(model: Model, layer: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model.module(text())
    hook.remove()
    return torch.cat(seen).float()


@pytest.mark.parametrize("family", families.names())
def test_the_sequential_update_loses_less_on_what_the_compressed_model_reads(family: str, tiny: Tiny) -> None:
    dense = loading.load(tiny(family)).linears()
    plain, fitted = made(tiny(family), "none"), made(tiny(family), "sequential")
    last = len(fitted.blocks) - 1
    query = f"{fitted.blocks_name}.{last}.{fitted.family.attention.query}"
    weight = dense[query].weight.detach().float()
    x = read_by(fitted, fitted.module.get_submodule(query))

    def lost(model: Model) -> float:
        u, v = (model.module.get_submodule(f"{query}.{part}").weight.float() for part in "uv")
        return loss(weight, u @ v, x)

    assert lost(fitted) <= lost(plain) * 1.001
    same = [
        torch.equal(*(model.module.get_submodule(f"{name}.v").weight for model in (plain, fitted)))
        for name in dense
    ]
    assert all(same)


def test_the_first_linears_read_what_they_always_did_so_that_only_later_ones_change(tiny_llama: Path) -> None:
    plain, fitted = made(tiny_llama, "none"), made(tiny_llama, "sequential")

    def change(name: str) -> float:
        one, other = (model.module.get_submodule(f"{name}.u").weight.float() for model in (plain, fitted))
        return ((one - other).norm() / one.norm()).item()

    # bf16 rounds u and v after the decomposition, and the update makes up for v's rounding.
    assert change("model.layers.0.self_attn.q_proj") < 0.01
    assert change("model.layers.3.self_attn.q_proj") > 0.02


def test_ranks_from_one_budget_can_be_updated_too(tiny_llama: Path) -> None:
    model = made(tiny_llama, "sequential", "global")
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())
    with torch.no_grad():
        assert torch.isfinite(model.module(text()).logits).all()
