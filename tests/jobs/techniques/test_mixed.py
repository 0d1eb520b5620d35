"""Mixed precision: the bit assignment is optimal within its budget, and errors are those of the outputs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.compression import knapsack
from jobs.context import Context
from jobs.models import loading
from jobs.models.layers import PackedLinear
from jobs.techniques.mixed import Mixed
from jobs.techniques.rtn import Rtn

BITS = (2, 3, 4, 8)
TOKENS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))


def context(workdir: Path) -> Context:
    return Context(Statistics(None, ""), workdir, 0, calibration=TOKENS)


def make_case(seed: int, items: int, unit: int = 6) -> tuple[Tensor, Tensor]:
    """Return costs (sizes times bits) and errors that fall as bits rise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (items, 1), generator=generator) * unit
    errors = torch.rand(items, 4, generator=generator).cumsum(1).flip(1) * torch.rand(
        items, 1, generator=generator
    )
    return sizes * torch.tensor(BITS), errors


def lowest_error_by_enumeration(costs: Tensor, errors: Tensor, budget: int) -> float:
    combinations = map(list, itertools.product(range(4), repeat=len(costs)))
    return min(total_of(errors, chosen) for chosen in combinations if total_of(costs, chosen) <= budget)


def total_of(values: Tensor, chosen: list[int]) -> float:
    return sum(values[item, choice].item() for item, choice in enumerate(chosen))


@given(seed=st.integers(0, 999), items=st.integers(1, 5), average=st.floats(2, 8))
def test_the_assignment_is_optimal(seed: int, items: int, average: float) -> None:
    costs, errors = make_case(seed, items)
    budget = int(average * costs[:, 0].sum().item() / 2)
    chosen = knapsack.least_error(costs, errors, budget)
    assert total_of(costs, chosen) <= budget
    assert total_of(errors, chosen) == pytest.approx(lowest_error_by_enumeration(costs, errors, budget))


@pytest.mark.parametrize("bits", BITS)
def test_the_assignment_is_never_worse_than_uniform_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, errors = make_case(1, 12, unit=7)
    uniform = [BITS.index(bits)] * 12
    budget = int(total_of(costs, uniform))
    for states in (20_000, 40, 3):  # fewer states than units: costs are rounded up
        monkeypatch.setattr(knapsack, "_STATES", states)
        chosen = knapsack.least_error(costs, errors, budget)
        assert total_of(costs, chosen) <= budget
        assert total_of(errors, chosen) <= total_of(errors, uniform) + 1e-9


def test_a_budget_below_the_lowest_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest choices cost 24, more than the budget of 23"):
        knapsack.least_error(torch.tensor([[24, 36]]), torch.rand(1, 2), 23)


@pytest.mark.parametrize(
    ("average", "widths"),
    [
        (2.25, "2 3 4 8"), (3.1, "2 3 4 8"), (4.0, "2 3 4 8"), (5.7, "2 3 4 8"), (8.0, "2 3 4 8"),
        (3.1, "2 4 8"), (4.0, "4 8"), (5.7, "4 8"),
    ],
)  # fmt: skip
def test_bits_stay_within_the_average_and_the_predicted_layout(
    average: float, widths: str, tiny_llama: Path, tmp_path: Path
) -> None:
    step = Mixed(average_bits=average, widths=widths)
    original = loading.original_layout(tiny_llama)
    layout = step.compress(loading.load(tiny_llama), context(tmp_path)).layout()
    used = {name: spec.packing.bits for name, spec in layout.linears.items() if spec.packing}
    assert {str(bits) for bits in used.values()} <= {*widths.split()}
    sizes = {name: spec.out_features * spec.in_features for name, spec in layout.linears.items()}
    assert sum(used[name] * sizes[name] for name in used) <= average * sum(sizes.values())
    expected = step.output_layout(original).tensors()
    assert layout.tensors().keys() == expected.keys()
    actual_bytes = sum(tensor.size_bytes for tensor in layout.tensors().values())
    expected_bytes = sum(tensor.size_bytes for tensor in expected.values())
    assert 0.9 * expected_bytes < actual_bytes <= expected_bytes


def test_an_average_below_all_widths_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"average_bits=3\.5 is less than the fewest of widths='4 8'"):
        Mixed(average_bits=3.5, widths="4 8").output_layout(loading.original_layout(tiny_llama))


def test_errors_are_those_of_the_outputs_and_computed_once_for_all_averages(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shared = context(tmp_path)
    Mixed(average_bits=3).compress(loading.load(tiny_llama), shared)

    def refuse() -> tuple[dict[str, Tensor], dict[str, str]]:
        raise AssertionError("computed again")

    errors = shared.statistics.stored("rounding-64-asymmetric", refuse)
    grams = shared.statistics.grams(loading.load(tiny_llama), TOKENS, shared.report)
    names = loading.load(tiny_llama).linears()
    assert set(errors) == set(names)
    name = "model.layers.0.mlp.up_proj"
    weight = loading.load(tiny_llama).module.get_submodule(name).weight.float()
    plain = Rtn(bits=2, group=64).compress(loading.load(tiny_llama), shared).module.get_submodule(name)
    assert isinstance(plain, PackedLinear)
    difference = plain.weight() - weight
    unclipped_error = (difference @ grams.gram(name) * difference).sum().item()
    assert 0.3 * unclipped_error < errors[name][0].item() < unclipped_error  # clipping reduces the error
    assert errors[name].tolist() == sorted(errors[name].tolist(), reverse=True)


def test_a_more_important_linear_gets_more_bits(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    falling = torch.tensor([1.0, 0.25, 0.06, 0.0])
    errors = dict.fromkeys(layout.linears, falling)
    importance = {name: torch.tensor(1.0) for name in errors}
    for name in importance:
        if name.endswith("o_proj"):
            importance[name] = torch.tensor(1000.0)
    bits = Mixed(average_bits=3).choose_bits(layout.linears, errors, importance)
    assert {bits[name] for name in bits if name.endswith("o_proj")} == {8}
    assert 2 in bits.values()
