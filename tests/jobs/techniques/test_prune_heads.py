"""Heads are pruned by their contribution to the output, in whole key-value groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.prune_heads import HeadSlices, PruneHeads, group_scores, groups_of, kept_groups

FAMILIES = ("llama", "gpt2", "gpt_neox", "bert", "mobilebert", "opt", "gptj", "distilbert")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    rows = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    return Context(Statistics(None, "parent"), tmp_path, seed=0, calibration=rows)


def zero_out(model: Model, groups: list[list[int]]) -> None:
    """Set the output projection's columns of these groups of each block to zero."""
    layout = model.layout()
    for block, block_groups in enumerate(groups):
        slices = HeadSlices(layout, block)
        out = model.module.get_submodule(slices.out)
        out.get_parameter("weight").data[:, slices.columns(block_groups)] = 0


def compute_outputs(model: Model) -> Tensor:
    rows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.answer(rows).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_equals_the_original_with_those_heads_zeroed(
    tiny: Callable[..., Path], family: str, context: Context
) -> None:
    folder = tiny(family)
    original = loading.load(folder)
    layout = original.layout()
    dropped = []
    for block in range(layout.depth):
        name = HeadSlices(layout, block).out
        assert context.calibration is not None
        gram = context.statistics.grams(original, context.calibration, context.report).gram(name)
        groups = groups_of(layout, block)
        weight = original.module.get_submodule(name).get_parameter("weight").float()
        ranked = group_scores(weight, gram, groups).argsort(descending=True, stable=True).tolist()
        dropped.append(ranked[kept_groups(groups, 0.5) :])
    pruned = PruneHeads(ratio=0.5, correction="none").compress(loading.load(folder), context)
    zero_out(original, dropped)
    assert sum(map(len, dropped)) >= layout.depth
    torch.testing.assert_close(compute_outputs(pruned), compute_outputs(original), rtol=0.02, atol=0.02)


def test_the_score_of_a_group_is_the_energy_of_its_contribution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    expected = [
        (x[:, start : start + 2] @ weight[:, start : start + 2].T).square().sum(-1).mean()
        for start in (0, 2, 4)
    ]
    torch.testing.assert_close(group_scores(weight, x.T @ x / 50, 3), torch.stack(expected))


def test_refitting_remaining_heads_reduces_the_output_error(
    tiny: Callable[..., Path], context: Context
) -> None:
    folder = tiny("bert")
    expected = compute_outputs(loading.load(folder))
    errors = {
        correction: (
            compute_outputs(PruneHeads(0.5, correction).compress(loading.load(folder), context)) - expected
        )
        .norm()
        .item()
        for correction in ("none", "least_squares")
    }
    assert errors["least_squares"] < errors["none"]


def test_at_least_one_group_remains() -> None:
    assert [kept_groups(3, ratio) for ratio in (0.0, 0.2, 0.34, 0.9)] == [3, 2, 2, 1]
    assert kept_groups(1, 0.9) == 1
