"""SVD-LLM: the whitened decomposition is optimal on the inputs, and the sequential update never makes it worse."""

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


def make_case(seed: int, out: int = 12, into: int = 9, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, correlated inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, into, generator=generator) @ torch.randn(into, into, generator=generator)
    return torch.randn(out, into, generator=generator), x, x.T @ x / tokens


def factorize(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, v, _ = terms_of(weight, root_of(gram).float())
    return u[:, :rank], v[:rank]


def approximate(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    u, v = factorize(weight, gram, rank)
    return u @ v


def output_error(weight: Tensor, approximation: Tensor, x: Tensor) -> float:
    return (x @ (weight - approximation).T).norm().item()


@pytest.mark.parametrize(("out", "into"), [(12, 9), (9, 12), (7, 7)])
def test_full_rank_is_the_identity(out: int, into: int) -> None:
    weight, _, gram = make_case(0, out, into)
    assert torch.allclose(approximate(weight, gram, min(out, into)), weight, atol=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_matrix_of_that_rank_has_a_smaller_output_error(seed: int, rank: int) -> None:
    weight, x, gram = make_case(seed)
    actual = output_error(weight, approximate(weight, gram, rank), x)
    # Eckart and Young: the error is the energy of the omitted singular values. At nearly full rank that energy
    # may be below the rounding error of the Gram matrix in fp32, the root of its epsilon.
    values = terms_of(weight, root_of(gram).float())[2]
    rounding = 4e-4 * output_error(weight, torch.zeros_like(weight), x)
    assert actual == pytest.approx(values[rank:].norm().item() * 200**0.5, rel=1e-2, abs=rounding)
    u, v, _ = terms_of(weight, torch.ones(9))
    assert actual <= output_error(weight, u[:, :rank] @ v[:rank], x) * 1.001 + rounding
    u, v, _ = terms_of(weight, gram.diagonal() ** 0.25)
    assert actual <= output_error(weight, u[:, :rank] @ v[:rank], x) * 1.001 + rounding


def test_the_factors_equal_the_papers_formula() -> None:
    weight, _, gram = make_case(1)
    root = torch.linalg.cholesky(gram.double())
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    paper = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    assert torch.allclose(approximate(weight, gram, 4).double(), paper, atol=1e-3)


def test_a_singular_gram_matrix_gives_finite_accurate_factors() -> None:
    weight, x, _ = make_case(2, tokens=4)  # fewer tokens than inputs
    gram = x.T @ x / 4
    assert output_error(weight, approximate(weight, gram, 4), x) < 1e-3
    assert torch.isfinite(approximate(weight, torch.zeros_like(gram), 3)).all()
    assert torch.isfinite(approximate(torch.zeros_like(weight), gram, 3)).all()


# The update


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_the_update_solves_least_squares_and_never_increases_the_error(seed: int, rank: int) -> None:
    weight, _, gram = make_case(seed)
    _, new_inputs, new_gram = make_case(seed + 5000)
    u, v = factorize(weight, gram, rank)
    better = updated(weight, u, v, new_gram)
    initial_error, updated_error = (
        output_error(weight, u @ v, new_inputs),
        output_error(weight, better @ v, new_inputs),
    )
    assert updated_error <= initial_error + 1e-5 * output_error(weight, torch.zeros_like(weight), new_inputs)
    # The ridge is written as additional rows: their targets are u, their inputs the root of the ridge.
    hidden = (new_inputs @ v.T).double() / len(new_inputs) ** 0.5
    ridge = (1e-4 * hidden.square().sum(dim=0).mean()).sqrt() * torch.eye(rank).double()
    rows = torch.cat([hidden, ridge])
    targets = torch.cat([(new_inputs @ weight.T).double() / len(new_inputs) ** 0.5, ridge @ u.T.double()])
    solution = torch.linalg.lstsq(rows, targets).solution.T
    assert torch.allclose(better.double(), solution, rtol=1e-3, atol=1e-3)


def test_on_the_inputs_of_the_decomposition_the_update_changes_nothing() -> None:
    weight, _, gram = make_case(3)
    u, v = factorize(weight, gram, 4)
    assert torch.allclose(updated(weight, u, v, gram), u, atol=1e-4)


def test_without_information_in_the_inputs_u_stays() -> None:
    weight, _, gram = make_case(4)
    u, v = factorize(weight, gram, 4)
    assert torch.equal(updated(weight, u, v, torch.zeros_like(gram)), u)
    single_input_gram = torch.zeros_like(gram)
    single_input_gram[2, 2] = 1.0  # only one input is ever non-zero
    updated_u = updated(weight, u, v, single_input_gram)
    assert torch.isfinite(updated_u).all()
    assert output_error(weight, updated_u @ v, torch.eye(9)[2:3]) < 0.05 * output_error(
        weight, u @ v, torch.eye(9)[2:3]
    )


def make_tokens() -> Tensor:
    return torch.randint(3, 512, (16, 32), generator=torch.Generator().manual_seed(0))


def compress(original: Path, update: str, allocation: str = "uniform") -> Model:
    context = Context(Statistics(None, "key"), Path(), 0, calibration=make_tokens())
    step = SvdLlm(keep=0.4, update=update, allocation=allocation)
    model = step.compress(loading.load(original), context)
    assert step.exact == (allocation == "uniform")
    if step.exact:
        assert model.layout() == step.output_layout(loading.original_layout(original))
    return model


def read_inputs(model: Model, layer: nn.Module) -> Tensor:
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model.module(make_tokens())
    hook.remove()
    return torch.cat(inputs).float()


@pytest.mark.parametrize("family", families.names())
def test_the_sequential_update_reduces_the_error_on_the_compressed_models_inputs(
    family: str, tiny: Tiny
) -> None:
    dense = loading.load(tiny(family)).linears()
    plain, updated_model = compress(tiny(family), "none"), compress(tiny(family), "sequential")
    last = len(updated_model.blocks) - 1
    query = f"{updated_model.blocks_name}.{last}.{updated_model.family.attention.query}"
    weight = dense[query].weight.detach().float()
    x = read_inputs(updated_model, updated_model.module.get_submodule(query))

    def query_error(model: Model) -> float:
        u, v = (model.module.get_submodule(f"{query}.{part}").weight.float() for part in "uv")
        return output_error(weight, u @ v, x)

    assert query_error(updated_model) <= query_error(plain) * 1.001
    for name in dense:
        plain_v = plain.module.get_submodule(f"{name}.v").weight
        assert torch.equal(plain_v, updated_model.module.get_submodule(f"{name}.v").weight), name


def test_the_update_changes_only_later_linears_since_the_first_read_unchanged_inputs(
    tiny_llama: Path,
) -> None:
    plain, updated_model = compress(tiny_llama, "none"), compress(tiny_llama, "sequential")

    def relative_change(name: str) -> float:
        plain_u, updated_u = (
            model.module.get_submodule(f"{name}.u").weight.float() for model in (plain, updated_model)
        )
        return ((plain_u - updated_u).norm() / plain_u.norm()).item()

    # bf16 rounds u and v after the decomposition, and the update compensates for the rounding of v.
    assert relative_change("model.layers.0.self_attn.q_proj") < 0.01
    assert relative_change("model.layers.3.self_attn.q_proj") > 0.02


def test_globally_allocated_ranks_can_be_updated(tiny_llama: Path) -> None:
    model = compress(tiny_llama, "sequential", "global")
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())
    with torch.no_grad():
        assert torch.isfinite(model.module(make_tokens()).logits).all()
