"""Properties that all factorization techniques share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.compression import importance as importance_module
from jobs.compression.low_rank import allocate, even_rank_of, factored, rank_of, terms_of
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.layers import LowRankLinear
from jobs.models.layout import LinearSpec
from jobs.models.model import Model
from jobs.technique import Technique
from tests.conftest import Tiny

ALL = ("svd", "asvd", "svd_llm")


def tokens() -> Tensor:
    return torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))


def context(folder: Path | None = None) -> Context:
    return Context(Statistics(folder, "parent"), Path(), 0, calibration=tokens())


def compress(name: str, options: dict[str, float | str], original: Path) -> tuple[Technique, Model]:
    step = techniques.load(name).of(dict(options))
    return step, step.compress(loading.load(original), context())


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8, 0.999])
@pytest.mark.parametrize(("out", "into"), [(576, 576), (1536, 576), (192, 576), (3, 2)])
def test_the_factors_have_at_most_the_requested_share_of_weights(keep: float, out: int, into: int) -> None:
    rank = rank_of(keep, out, into)
    assert rank >= 1
    assert rank == 1 or rank * (out + into) <= keep * out * into


@pytest.mark.parametrize(("keep", "expected"), [(0.9, 256), (0.5, 128), (0.12, 32), (0.1, 28), (0.001, 1)])
def test_uniform_ranks_of_at_least_32_are_multiples_of_32(keep: float, expected: int) -> None:
    assert even_rank_of(keep, 576, 576) == expected
    assert expected <= rank_of(keep, 576, 576) < expected + 32


def test_a_rank_outside_the_range_of_the_factors_is_refused_with_the_layer_name() -> None:
    dense = nn.Linear(5, 7)
    u, v, _ = terms_of(dense.weight.detach(), torch.ones(5))
    assert u.shape == (7, 5)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"rank={rank} of some\.layer is outside \[1, 5\]"):
            factored(dense, u, v, rank, "some.layer")


def test_full_rank_is_the_identity_up_to_rounding() -> None:
    dense = nn.Linear(24, 40).to(torch.bfloat16)
    weight = dense.weight.detach().float()
    for root in (torch.ones(24), random_tensor(24), random_tensor(24, 24)):
        layer = factored(dense, *terms_of(weight, root)[:2], 24, "layer")
        x = random_tensor(100, 24)
        exact = nn.functional.linear(x, weight, dense.bias.detach().float())
        assert (layer(x.to(torch.bfloat16)).float() - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(layer.u.bias, dense.bias)
        assert layer.v.bias is None


def test_zero_weights_and_zero_norms_give_finite_factors() -> None:
    weight = random_tensor(6, 4)
    for matrix, root in ((weight * 0, torch.eye(4)), (weight, torch.zeros(4)), (weight, torch.zeros(4, 4))):
        u, v, values = terms_of(matrix, root)
        assert all(torch.isfinite(factor).all() for factor in (u, v, values))


# Allocation


def make_specs(shapes: list[tuple[int, int]]) -> dict[str, LinearSpec]:
    return {f"layer{n}": LinearSpec(out, into, False) for n, (out, into) in enumerate(shapes)}


def total_error(spectra: dict[str, Tensor], importance: dict[str, float], ranks: dict[str, int]) -> float:
    return sum(
        importance[name] * s[ranks[name] :].double().square().sum().item() for name, s in spectra.items()
    )


def count_weights(linears: dict[str, LinearSpec], ranks: dict[str, int]) -> int:
    return sum(ranks[name] * (spec.out_features + spec.in_features) for name, spec in linears.items())


def lowest_error_by_enumeration(
    linears: dict[str, LinearSpec], spectra: dict[str, Tensor], importance: dict[str, float], budget: float
) -> float:
    choices = [range(1, rank_of(1.0, spec.out_features, spec.in_features) + 1) for spec in linears.values()]
    combinations = [dict(zip(linears, ranks, strict=True)) for ranks in itertools.product(*choices)]
    affordable = [ranks for ranks in combinations if count_weights(linears, ranks) <= budget]
    return min(total_error(spectra, importance, ranks) for ranks in affordable)


def draw_spectra(linears: dict[str, LinearSpec], seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draw spectra and importances of layers that differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {
        name: torch.rand(min(spec.out_features, spec.in_features), generator=generator)
        .pow(3)
        .sort(descending=True)
        .values
        for name, spec in linears.items()
    }
    return spectra, {name: 10 ** torch.randn(1, generator=generator).item() for name in linears}


def budget_of(linears: dict[str, LinearSpec], keep: float) -> float:
    return keep * sum(spec.out_features * spec.in_features for spec in linears.values())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.5, 1.0))
def test_for_equal_rank_costs_the_allocation_is_optimal(seed: int, keep: float) -> None:
    linears = make_specs([(8, 8), (8, 8), (6, 10), (10, 6)])
    spectra, importance = draw_spectra(linears, seed)
    budget = budget_of(linears, keep)
    ranks = allocate(linears, spectra, importance, budget)
    assert count_weights(linears, ranks) <= budget
    best = lowest_error_by_enumeration(linears, spectra, importance, budget)
    assert total_error(spectra, importance, ranks) == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.5, 1.0))
def test_for_unequal_rank_costs_the_allocation_is_optimal_within_the_highest_cost(
    seed: int, keep: float
) -> None:
    linears = make_specs([(8, 8), (4, 12), (16, 8), (8, 24)])
    spectra, importance = draw_spectra(linears, seed)
    budget, highest_cost = budget_of(linears, keep), 32
    ranks = allocate(linears, spectra, importance, budget)
    assert count_weights(linears, ranks) <= budget
    lowest_cost = count_weights(linears, dict.fromkeys(linears, 1))
    actual = total_error(spectra, importance, ranks)
    assert actual <= lowest_error_by_enumeration(
        linears, spectra, importance, max(budget - highest_cost, lowest_cost)
    ) * (1 + 1e-6)
    assert actual >= lowest_error_by_enumeration(linears, spectra, importance, budget) * (1 - 1e-6)


def test_the_allocation_of_two_layers_equals_the_hand_worked_case() -> None:
    # The squared values are 16, 4, 1, 1, with importance 2, and 3, 3, 3, 3. After the first rank, further ranks
    # of layer 0 are worth 8 and 2, those of layer 1 are worth 3 each. Of 64 weights, the first ranks cost 32, and
    # two more ranks fit: those worth 8 and 3.
    linears = make_specs([(8, 8), (8, 8)])
    spectra = {"layer0": Tensor([4, 2, 1, 1]), "layer1": Tensor([3, 3, 3, 3]).sqrt()}
    importance = {"layer0": 2.0, "layer1": 1.0}
    assert allocate(linears, spectra, importance, 64) == {"layer0": 2, "layer1": 2}
    assert allocate(linears, spectra, importance, 96) == {"layer0": 2, "layer1": 4}
    assert allocate(linears, spectra, importance, 111) == {"layer0": 2, "layer1": 4}
    assert allocate(linears, spectra, importance, 112) == {"layer0": 3, "layer1": 4}
    assert allocate(linears, spectra, importance, 0) == {"layer0": 1, "layer1": 1}
    assert allocate(linears, spectra, importance, 1000) == {"layer0": 4, "layer1": 4}


# Techniques


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mobilebert"])
def test_global_ranks_keep_the_predicted_names_and_size(family: str, keep: float, tiny: Tiny) -> None:
    step, model = compress("svd", {"keep": keep, "allocation": "global"}, tiny(family))
    original = loading.original_layout(tiny(family))
    predicted, layout = step.output_layout(original), model.layout()
    assert not step.exact
    assert predicted.linears.keys() == layout.linears.keys()
    predicted_bytes = sum(tensor.size_bytes for tensor in predicted.tensors().values())
    actual_bytes = sum(tensor.size_bytes for tensor in layout.tensors().values())
    assert 0.97 * predicted_bytes <= actual_bytes <= predicted_bytes
    assert layout.size_bytes() <= predicted.size_bytes() + 4096
    for name, spec in original.linears.items():
        rank = layout.linears[f"{name}.v"].out_features
        assert 1 <= rank <= rank_of(1.0, spec.out_features, spec.in_features)


@pytest.mark.parametrize("name", ALL)
def test_global_ranks_have_a_smaller_total_error_than_uniform_ranks(name: str, tiny_llama: Path) -> None:
    _, uniform_model = compress(name, {"keep": 0.5}, tiny_llama)
    _, global_model = compress(name, {"keep": 0.5, "allocation": "global"}, tiny_llama)
    assert global_model.layout().linears != uniform_model.layout().linears
    shared_context = context()
    terms = _read_stored_terms(name, tiny_llama, shared_context)
    linears = loading.original_layout(tiny_llama).linears
    spectra = {linear: terms[f"{linear}.values"] for linear in linears}
    importance = dict.fromkeys(linears, 1.0)
    if name != "svd":
        sensitivities = importance_module.sensitivities(loading.load(tiny_llama), shared_context)
        importance = {linear: sensitivities[linear].item() for linear in linears}
    errors = []
    for model in (uniform_model, global_model):
        ranks = {linear: model.layout().linears[f"{linear}.v"].out_features for linear in linears}
        errors.append(total_error(spectra, importance, ranks))
    assert errors[1] < errors[0]


def _read_stored_terms(name: str, original: Path, shared_context: Context) -> Mapping[str, Tensor]:
    """Return the decompositions that the technique stores in the statistics."""
    techniques.load(name).of({}).compress(loading.load(original), shared_context)
    kind = {"svd": "svd-plain", "asvd": "svd-scaled-0.5", "svd_llm": "svd-whitened"}[name]
    return shared_context.statistics.stored(kind, lambda: ({}, {}))


@pytest.mark.parametrize("name", ALL)
def test_a_second_rank_reuses_the_stored_decomposition(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique = techniques.load(name)
    technique.of({"keep": 0.7}).compress(loading.load(tiny_llama), context(tmp_path))
    without_cache = technique.of({"keep": 0.4}).compress(loading.load(tiny_llama), context())

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with_cache = technique.of({"keep": 0.4}).compress(loading.load(tiny_llama), context(tmp_path))
    first, cached = without_cache.module.state_dict(), with_cache.module.state_dict()
    assert all(torch.equal(first[key], cached[key]) for key in first)


@pytest.mark.parametrize("name", ALL)
def test_the_error_falls_as_the_rank_rises(name: str, tiny_llama: Path) -> None:
    dense = loading.load(tiny_llama).linears()
    grams = context().statistics.grams(loading.load(tiny_llama), tokens(), lambda share, activity: None)
    errors: dict[str, list[float]] = {linear: [] for linear in dense}
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        _, model = compress(name, {"keep": keep}, tiny_llama)
        for linear, layer in dense.items():
            factored_layer = model.module.get_submodule(linear)
            assert isinstance(factored_layer, LowRankLinear)
            difference = (
                layer.weight - factored_layer.u.weight.float() @ factored_layer.v.weight.float()
            ).detach()
            if name == "svd_llm":
                errors[linear].append((difference @ grams.gram(linear) * difference).sum().item())
            elif name == "svd":
                errors[linear].append(difference.square().sum().item())
            else:
                scales = grams.gram(linear).diagonal().sqrt()
                errors[linear].append((difference.square() * scales).sum().item())
    assert all(values == sorted(values, reverse=True) for values in errors.values())


@pytest.mark.parametrize("family", families.names())
def test_factorization_keeps_biases(family: str, tiny: Tiny) -> None:
    dense = loading.load(tiny(family)).linears()
    _, model = compress("svd", {"keep": 0.4}, tiny(family))
    for name, layer in dense.items():
        factored_layer = model.module.get_submodule(name)
        assert isinstance(factored_layer, LowRankLinear)
        assert factored_layer.v.bias is None
        assert (factored_layer.u.bias is None) == (layer.bias is None)
        assert layer.bias is None or torch.equal(factored_layer.u.bias, layer.bias)


@pytest.mark.parametrize("name", ALL)
def test_keeping_everything_is_a_no_op(name: str, tiny_llama: Path) -> None:
    for allocation in ("uniform", "global"):
        step = techniques.load(name).of({"keep": 1.0, "allocation": allocation})
        assert step.is_noop
        assert step.exact
        layout = loading.original_layout(tiny_llama)
        assert step.output_layout(layout) == layout
