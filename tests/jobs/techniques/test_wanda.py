"""Wanda: scores and masks equal the paper's example and slow reference computations."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.calibration.statistics import Statistics
from jobs.compression.sparsity import Sparsity
from jobs.context import Context
from jobs.models import loading
from jobs.techniques.wanda import Wanda, scores


def test_the_papers_example_gives_the_mask_of_its_figure() -> None:
    """Sun et al., figure 1, has three outputs and four inputs with norms 1, 2, 8 and 3."""
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    actual_scores = scores(weight, torch.tensor([1.0, 2, 8, 3]).square())
    assert actual_scores.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    mask = Sparsity(0.5).mask_by_row(actual_scores)
    assert (weight * mask).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]
    paired_mask = Sparsity(0.0, "2:4").mask_by_row(actual_scores)
    assert torch.equal(paired_mask, mask)  # four inputs are one group


def test_the_norms_are_those_of_each_linears_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))
    original = loading.load(tiny_llama)
    pruned = Wanda(sparsity=0.6).compress(
        loading.load(tiny_llama), Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens)
    )
    for name, layer in original.linears().items():
        inputs: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(
            lambda module, args, inputs_list=inputs: inputs_list.append(args[0])
        )
        with torch.no_grad():
            original.module(tokens)
        hook.remove()
        weight = layer.get_parameter("weight").double()
        expected_scores = weight.abs() * inputs[0].flatten(0, 1).double().norm(dim=0)
        sparse = pruned.linears()[name]
        mask = sparse.kept()
        for row, row_mask in zip(expected_scores, mask, strict=True):
            assert row[row_mask].min() > row[~row_mask].max() * (1 - 1e-3)
        assert torch.equal(sparse.weight(), torch.where(mask, layer.get_parameter("weight"), 0))


def test_options_without_effect_do_not_change_the_recipe() -> None:
    assert Wanda(sparsity=0.3, pattern="2:4") == Wanda(sparsity=0.7, pattern="2:4")
    assert Wanda(sparsity=0.3) != Wanda(sparsity=0.7)
