"""Heads are pruned by what they add to the output, whole key-value groups at a time."""

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


def silence(model: Model, groups: list[list[int]]) -> None:
    """Set to zero what these groups of each block give to the output projection."""
    layout = model.layout()
    for block, some in enumerate(groups):
        places = HeadSlices(layout, block)
        out = model.module.get_submodule(places.out)
        out.get_parameter("weight").data[:, places.columns(some)] = 0


def answer(model: Model) -> Tensor:
    rows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.answer(rows).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_computes_what_the_original_does_with_those_heads_silent(
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
    silence(original, dropped)
    assert sum(map(len, dropped)) >= layout.depth
    torch.testing.assert_close(answer(pruned), answer(original), rtol=0.02, atol=0.02)


def test_a_groups_worth_is_the_energy_of_what_it_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    slow = [(x[:, at : at + 2] @ weight[:, at : at + 2].T).square().sum(-1).mean() for at in (0, 2, 4)]
    torch.testing.assert_close(group_scores(weight, x.T @ x / 50, 3), torch.stack(slow))


def test_refitting_the_rest_brings_the_output_nearer(tiny: Callable[..., Path], context: Context) -> None:
    folder = tiny("bert")
    goal = answer(loading.load(folder))
    off = {
        way: (answer(PruneHeads(0.5, way).compress(loading.load(folder), context)) - goal).norm().item()
        for way in ("none", "least_squares")
    }
    assert off["least_squares"] < off["none"]


def test_one_group_stays_however_high_the_ratio() -> None:
    assert [kept_groups(3, ratio) for ratio in (0.0, 0.2, 0.34, 0.9)] == [3, 2, 2, 1]
    assert kept_groups(1, 0.9) == 1
