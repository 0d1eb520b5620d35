from __future__ import annotations

from pathlib import Path

import torch

from jobs.calibration.statistics import Statistics
from jobs.compression.sparsity import Sparsity
from jobs.context import Context
from jobs.models import loading
from jobs.techniques.wanda import Wanda, scores


def test_the_papers_example_comes_out_as_in_its_figure() -> None:
    """Sun et al., figure 1: three outputs of four inputs, whose norms are 1, 2, 8 and 3."""
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    found = scores(weight, torch.tensor([1.0, 2, 8, 3]).square())
    assert found.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    kept = Sparsity(0.5).mask_by_row(found)
    assert (weight * kept).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]
    paired = Sparsity(0.0, "2:4").mask_by_row(found)
    assert torch.equal(paired, kept)  # four inputs are one group


def test_the_norms_are_those_of_what_each_linear_reads(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))
    original = loading.load(tiny_llama)
    made = Wanda(sparsity=0.6).compress(
        loading.load(tiny_llama), Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens)
    )
    for name, layer in original.linears().items():
        read: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda module, args, to=read: to.append(args[0]))
        with torch.no_grad():
            original.module(tokens)
        hook.remove()
        weight = layer.get_parameter("weight").double()
        found = weight.abs() * read[0].flatten(0, 1).double().norm(dim=0)
        sparse = made.linears()[name]
        kept = sparse.kept()
        for row, stays in zip(found, kept, strict=True):
            assert row[stays].min() > row[~stays].max() * (1 - 1e-3)
        assert torch.equal(sparse.weight(), torch.where(kept, layer.get_parameter("weight"), 0))


def test_settings_that_do_the_same_are_one_recipe() -> None:
    assert Wanda(sparsity=0.3, pattern="2:4") == Wanda(sparsity=0.7, pattern="2:4")
    assert Wanda(sparsity=0.3) != Wanda(sparsity=0.7)
