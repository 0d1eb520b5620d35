"""What all factorizations share."""

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


def compressed(name: str, options: dict[str, float | str], original: Path) -> tuple[Technique, Model]:
    step = techniques.load(name).of(dict(options))
    return step, step.compress(loading.load(original), context())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8, 0.999])
@pytest.mark.parametrize(("out", "into"), [(576, 576), (1536, 576), (192, 576), (3, 2)])
def test_the_factors_hold_no_more_than_the_share_to_keep(keep: float, out: int, into: int) -> None:
    rank = rank_of(keep, out, into)
    assert rank >= 1
    assert rank == 1 or rank * (out + into) <= keep * out * into


@pytest.mark.parametrize(("keep", "expected"), [(0.9, 256), (0.5, 128), (0.12, 32), (0.1, 28), (0.001, 1)])
def test_uniform_ranks_are_multiples_of_32_where_they_are_as_large(keep: float, expected: int) -> None:
    assert even_rank_of(keep, 576, 576) == expected
    assert expected <= rank_of(keep, 576, 576) < expected + 32


def test_a_rank_that_the_factors_do_not_have_is_refused_by_name() -> None:
    dense = nn.Linear(5, 7)
    u, v, _ = terms_of(dense.weight.detach(), torch.ones(5))
    assert u.shape == (7, 5)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"rank={rank} of some\.layer is outside \[1, 5\]"):
            factored(dense, u, v, rank, "some.layer")


def test_full_rank_is_the_identity_but_for_rounding() -> None:
    dense = nn.Linear(24, 40).to(torch.bfloat16)
    weight = dense.weight.detach().float()
    for root in (torch.ones(24), random(24), random(24, 24)):
        layer = factored(dense, *terms_of(weight, root)[:2], 24, "layer")
        x = random(100, 24)
        exact = nn.functional.linear(x, weight, dense.bias.detach().float())
        assert (layer(x.to(torch.bfloat16)).float() - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(layer.u.bias, dense.bias)
        assert layer.v.bias is None


def test_zero_weights_and_norms_that_see_nothing_do_no_harm() -> None:
    weight = random(6, 4)
    for one, root in ((weight * 0, torch.eye(4)), (weight, torch.zeros(4)), (weight, torch.zeros(4, 4))):
        u, v, values = terms_of(one, root)
        assert all(torch.isfinite(found).all() for found in (u, v, values))


# Allocation


def specs(shapes: list[tuple[int, int]]) -> dict[str, LinearSpec]:
    return {f"layer{n}": LinearSpec(out, into, False) for n, (out, into) in enumerate(shapes)}


def total_error(spectra: dict[str, Tensor], importance: dict[str, float], ranks: dict[str, int]) -> float:
    return sum(
        importance[name] * s[ranks[name] :].double().square().sum().item() for name, s in spectra.items()
    )


def spent(linears: dict[str, LinearSpec], ranks: dict[str, int]) -> int:
    return sum(ranks[name] * (spec.out_features + spec.in_features) for name, spec in linears.items())


def best_by_trying(
    linears: dict[str, LinearSpec], spectra: dict[str, Tensor], importance: dict[str, float], budget: float
) -> float:
    choices = [range(1, rank_of(1.0, spec.out_features, spec.in_features) + 1) for spec in linears.values()]
    tried = [dict(zip(linears, ranks, strict=True)) for ranks in itertools.product(*choices)]
    fitting = [ranks for ranks in tried if spent(linears, ranks) <= budget]
    return min(total_error(spectra, importance, ranks) for ranks in fitting)


def drawn(linears: dict[str, LinearSpec], seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Spectra and importances of layers that differ in scale."""
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
def test_equally_dear_ranks_are_given_out_as_well_as_by_trying_all(seed: int, keep: float) -> None:
    linears = specs([(8, 8), (8, 8), (6, 10), (10, 6)])
    spectra, importance = drawn(linears, seed)
    budget = budget_of(linears, keep)
    ranks = allocate(linears, spectra, importance, budget)
    assert spent(linears, ranks) <= budget
    best = best_by_trying(linears, spectra, importance, budget)
    assert total_error(spectra, importance, ranks) == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.5, 1.0))
def test_unequally_dear_ranks_are_the_best_but_for_less_than_the_dearest_costs(
    seed: int, keep: float
) -> None:
    linears = specs([(8, 8), (4, 12), (16, 8), (8, 24)])
    spectra, importance = drawn(linears, seed)
    budget, dearest = budget_of(linears, keep), 32
    ranks = allocate(linears, spectra, importance, budget)
    assert spent(linears, ranks) <= budget
    least = spent(linears, dict.fromkeys(linears, 1))
    ours = total_error(spectra, importance, ranks)
    assert ours <= best_by_trying(linears, spectra, importance, max(budget - dearest, least)) * (1 + 1e-6)
    assert ours >= best_by_trying(linears, spectra, importance, budget) * (1 - 1e-6)


def test_a_worked_case_of_two_layers() -> None:
    # Squares 16, 4, 1, 1, twice as important, against 3, 3, 3, 3: the first's next ranks are worth 8 and 2,
    # the second's 3 each. Of 64 weights the first ranks cost 32, and two more fit: 8 and 3.
    linears = specs([(8, 8), (8, 8)])
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
def test_global_ranks_keep_names_and_bytes_within_what_is_foretold(
    family: str, keep: float, tiny: Tiny
) -> None:
    step, model = compressed("svd", {"keep": keep, "allocation": "global"}, tiny(family))
    original = loading.original_layout(tiny(family))
    foretold, made = step.output_layout(original), model.layout()
    assert not step.exact
    assert foretold.linears.keys() == made.linears.keys()
    held, told = (sum(t.size_bytes for t in layout.tensors().values()) for layout in (made, foretold))
    assert 0.97 * told <= held <= told
    assert made.size_bytes() <= foretold.size_bytes() + 4096
    for name, spec in original.linears.items():
        rank = made.linears[f"{name}.v"].out_features
        assert 1 <= rank <= rank_of(1.0, spec.out_features, spec.in_features)


@pytest.mark.parametrize("name", ALL)
def test_global_ranks_spend_the_same_and_lose_less_in_sum(name: str, tiny_llama: Path) -> None:
    _, uniform = compressed(name, {"keep": 0.5}, tiny_llama)
    _, spread = compressed(name, {"keep": 0.5, "allocation": "global"}, tiny_llama)
    assert spread.layout().linears != uniform.layout().linears
    given = context()
    terms = _terms(name, tiny_llama, given)
    linears = loading.original_layout(tiny_llama).linears
    spectra = {linear: terms[f"{linear}.values"] for linear in linears}
    importance = dict.fromkeys(linears, 1.0)
    if name != "svd":
        found = importance_module.sensitivities(loading.load(tiny_llama), given)
        importance = {linear: found[linear].item() for linear in linears}
    lost = [
        total_error(
            spectra,
            importance,
            {linear: model.layout().linears[f"{linear}.v"].out_features for linear in linears},
        )
        for model in (uniform, spread)
    ]
    assert lost[1] < lost[0]


def _terms(name: str, original: Path, given: Context) -> Mapping[str, Tensor]:
    """What the technique keeps of its decompositions."""
    techniques.load(name).of({}).compress(loading.load(original), given)
    kind = {"svd": "svd-plain", "asvd": "svd-scaled-0.5", "svd_llm": "svd-whitened"}[name]
    return given.statistics.stored(kind, lambda: ({}, {}))


@pytest.mark.parametrize("name", ALL)
def test_the_second_rank_needs_no_decomposition(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique = techniques.load(name)
    technique.of({"keep": 0.7}).compress(loading.load(tiny_llama), context(tmp_path))
    alone = technique.of({"keep": 0.4}).compress(loading.load(tiny_llama), context())

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    second = technique.of({"keep": 0.4}).compress(loading.load(tiny_llama), context(tmp_path))
    first, again = alone.module.state_dict(), second.module.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ALL)
def test_the_error_falls_as_the_rank_rises(name: str, tiny_llama: Path) -> None:
    dense = loading.load(tiny_llama).linears()
    grams = context().statistics.grams(loading.load(tiny_llama), tokens(), lambda share, what: None)
    errors: dict[str, list[float]] = {linear: [] for linear in dense}
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        _, model = compressed(name, {"keep": keep}, tiny_llama)
        for linear, layer in dense.items():
            found = model.module.get_submodule(linear)
            assert isinstance(found, LowRankLinear)
            difference = (layer.weight - found.u.weight.float() @ found.v.weight.float()).detach()
            if name == "svd_llm":
                errors[linear].append((difference @ grams.gram(linear) * difference).sum().item())
            elif name == "svd":
                errors[linear].append(difference.square().sum().item())
            else:
                scales = grams.gram(linear).diagonal().sqrt()
                errors[linear].append((difference.square() * scales).sum().item())
    assert all(found == sorted(found, reverse=True) for found in errors.values())


@pytest.mark.parametrize("family", families.names())
def test_biases_stay(family: str, tiny: Tiny) -> None:
    dense = loading.load(tiny(family)).linears()
    _, model = compressed("svd", {"keep": 0.4}, tiny(family))
    for name, layer in dense.items():
        found = model.module.get_submodule(name)
        assert isinstance(found, LowRankLinear)
        assert found.v.bias is None
        assert (found.u.bias is None) == (layer.bias is None)
        assert layer.bias is None or torch.equal(found.u.bias, layer.bias)


@pytest.mark.parametrize("name", ALL)
def test_with_all_kept_it_is_left_out_of_recipes(name: str, tiny_llama: Path) -> None:
    for allocation in ("uniform", "global"):
        step = techniques.load(name).of({"keep": 1.0, "allocation": allocation})
        assert step.is_noop
        assert step.exact
        layout = loading.original_layout(tiny_llama)
        assert step.output_layout(layout) == layout
