"""Sparsity: exact shares and patterns, predicted file sizes, and thresholds over several tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.compression.sparsity import Sparsity, highest, threshold
from jobs.context import Context
from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.svd_llm import SvdLlm

Tiny = Callable[..., Path]
ONE_SHOT_TECHNIQUES = ("magnitude", "wanda", "sparsegpt", "optimal_brain_damage")


def context(workdir: Path) -> Context:
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    return Context(Statistics(workdir, "parent"), workdir, seed=0, calibration=tokens)


@pytest.mark.parametrize("name", ONE_SHOT_TECHNIQUES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_each_row_loses_the_share_of_its_inputs_rounded_down(
    name: str, share: float, tiny_llama: Path, tmp_path: Path
) -> None:
    model = (
        techniques.load(name).of({"sparsity": share}).compress(loading.load(tiny_llama), context(tmp_path))
    )
    for layer in model.linears().values():
        assert layer.spec.kept == layer.spec.out_features * (
            layer.spec.in_features - int(share * layer.spec.in_features + 1e-9)
        )
        assert int(layer.kept().sum()) == layer.spec.kept


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_keeps_half_of_each_group_of_adjacent_weights(
    name: str, pattern: str, tiny_llama: Path, tmp_path: Path
) -> None:
    step = techniques.load(name).of({"pattern": pattern, "sparsity": 0.0})
    assert not step.is_noop
    model = step.compress(loading.load(tiny_llama), context(tmp_path))
    m = int(pattern[-1])
    for layer in model.linears().values():
        assert (layer.kept().view(-1, m).sum(dim=1) == m // 2).all()


@pytest.mark.parametrize("name", ONE_SHOT_TECHNIQUES)
def test_the_file_size_is_predicted_and_smaller_than_dense_only_at_high_sparsity(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    dense = loading.original_layout(tiny_llama)
    for share, smaller in ((0.5, True), (0.05, False)):
        step = techniques.load(name).of({"sparsity": share})
        expected = step.output_layout(dense)
        loading.save(
            step.compress(loading.load(tiny_llama), context(tmp_path / "x")), tmp_path / f"{share}", {}
        )
        size = (tmp_path / f"{share}" / loading.WEIGHTS).stat().st_size
        assert size == expected.size_bytes()
        assert (size < dense.size_bytes()) is smaller


@pytest.mark.parametrize("name", ONE_SHOT_TECHNIQUES)
def test_factors_can_be_sparse(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    factored = SvdLlm(keep=0.8).compress(loading.load(tiny_llama), context(tmp_path / "dense"))
    step = techniques.load(name)()
    expected = step.output_layout(factored.layout())
    pruned = step.compress(factored, context(tmp_path / "factored"))
    assert pruned.layout() == expected
    assert pruned.layout().forms() == {"factored", "sparse"}


def test_a_width_that_the_pattern_does_not_divide_is_refused_with_the_layer(tiny_llama: Path) -> None:
    layout = SvdLlm(keep=0.5).output_layout(loading.original_layout(tiny_llama))
    with pytest.raises(ValueError, match=r"wanda\.pattern=4:8: model\.layers\.\S+ has \d+ inputs.*of 8"):
        techniques.load("wanda").of({"pattern": "4:8"}).output_layout(layout)


def test_a_linear_too_narrow_to_remove_a_weight_stays_dense(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    for name in ONE_SHOT_TECHNIQUES:
        step = techniques.load(name).of({"sparsity": 0.01})
        layout = step.output_layout(model.layout())
        # floor(0.01 · 64) is 0, floor(0.01 · 160) is 1.
        narrow = {spec.in_features for spec in layout.linears.values() if spec.kept is None}
        assert narrow == {64}
        assert step.compress(loading.load(tiny_llama), context(tmp_path)).layout() == layout


def test_shares_without_exact_binary_value_are_rounded_correctly() -> None:
    assert [Sparsity(share / 100).removed_per_row(100) for share in range(96)] == list(range(96))
    assert Sparsity(0.95).removed_per_row(1) == 0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_the_highest_values_are_the_first_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    expected = [index in order[:count] for index in range(len(values))]
    assert highest(torch.tensor(values, dtype=torch.float32), count).tolist() == expected


@given(st.integers(0, 99), st.data())
def test_a_threshold_keeps_the_highest_values_of_all_tensors(seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(3, 5, generator=generator) ** 8, torch.rand(7, generator=generator) * 1e-3]
    parts[0][1] = parts[0][0]
    parts[0][2, :3] = torch.tensor([torch.inf, 0.0, -0.0])
    parts[1][:2] = parts[0][1, :2]
    count = data.draw(st.integers(1, 22))
    remaining = threshold(lambda: parts, count)
    masks = []
    for part in parts:
        mask, remaining = remaining.mask(part)
        masks.append(mask.flatten())
    all_values = torch.cat([part.flatten() for part in parts])
    assert torch.equal(torch.cat(masks), highest(all_values, count))
    assert remaining.ties == 0


def test_magnitude_keeps_the_largest_weights_of_the_whole_linear(tiny_llama: Path, tmp_path: Path) -> None:
    original_linears = loading.load(tiny_llama).linears()
    pruned = (
        techniques.load("magnitude")
        .of({"sparsity": 0.75})
        .compress(loading.load(tiny_llama), context(tmp_path))
    )
    counts = set()
    for name, layer in pruned.linears().items():
        weight = original_linears[name].get_parameter("weight")
        mask = layer.kept()
        assert torch.equal(layer.weight(), torch.where(mask, weight, 0))
        assert weight[mask].abs().min() >= weight[~mask].abs().max()
        counts |= set(mask.sum(dim=1).tolist())
    assert len(counts) > 1  # rows keep different numbers of weights


def compute_logits(model: Model) -> Tensor:
    tokens = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model.module(tokens).logits
    return logits


def test_transposed_linears_of_gpt2_are_pruned_by_row(tiny: Tiny, tmp_path: Path) -> None:
    pruned = techniques.load("wanda")().compress(loading.load(tiny("gpt2")), context(tmp_path))
    layer = pruned.linears()["transformer.h.0.mlp.c_fc"]
    assert (layer.kept().sum(dim=1) == 32).all()
    assert torch.isfinite(compute_logits(pruned)).all()
