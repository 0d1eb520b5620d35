"""Annealed ranks: gates by hand, nothing lost at either end, exact ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.compression import low_rank
from jobs.context import Context
from jobs.materials import TextSource
from jobs.models import loading
from jobs.models.layers import LowRankLinear, linear_of
from jobs.models.model import Model
from jobs.parallel import Sharing
from jobs.techniques import anneal_rank
from jobs.techniques.anneal_rank import AnnealRank, GatedLinear
from jobs.techniques.svd_llm import SvdLlm
from jobs.training import schedule


def context(original: Path, text_file: Path) -> Context:
    rows = data.windows_for(TextSource(str(text_file), 64, 32), original)
    return Context(
        Statistics(None, ""),
        original,
        0,
        calibration=rows,
        training=rows,
        teacher=lambda: loading.load(original),
    )


@torch.no_grad()
def outputs(model: Model) -> Tensor:
    return model.answer(torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def apart(model: Model, original: Path, text_file: Path) -> float:
    """The mean KL divergence from the original on text that training never saw."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    said, taught = (one.answer(rows).float().log_softmax(-1) for one in (model, loading.load(original)))
    return nn.functional.kl_div(said, taught, log_target=True, reduction="batchmean").item()


def gated(values: list[float]) -> GatedLinear:
    full = len(values)
    generator = torch.Generator().manual_seed(0)
    v, u = torch.randn(full, 7, generator=generator), torch.randn(6, full, generator=generator)
    return GatedLinear(linear_of(v, None), linear_of(u, torch.ones(6)), torch.tensor(values))


def test_values_beyond_the_rank_are_thresholded_and_the_weakest_close_first() -> None:
    layer = gated([8.0, 4.0, 2.0, 1.0])
    # The threshold is half of 4: 4 becomes 2, the half; 2 and 1 become 0.
    layer.close(1, 0.5)
    assert layer.gates.tolist() == [1.0, 0.5]
    layer.close(1, 0.25)
    assert layer.gates.tolist() == [1.0, 0.75, 0.5]
    layer.close(1, 0.0)
    assert layer.gates.tolist() == [1.0, 1.0, 1.0, 1.0]
    layer.close(1, 1.0)
    assert layer.gates.tolist() == [1.0]
    layer.close(4, 1.0)
    assert layer.gates.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_a_gated_linear_computes_the_thresholded_sum() -> None:
    layer = gated([8.0, 4.0, 2.0, 1.0])
    layer.close(1, 0.25)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    weight = sum(
        gate * torch.outer(layer.u.weight[:, i], layer.v.weight[i]) for i, gate in enumerate([1, 0.75, 0.5])
    )
    torch.testing.assert_close(layer(x), x @ weight.T + 1)


def test_with_all_gates_open_the_model_computes_what_it_did(tiny_llama: Path, text_file: Path) -> None:
    model = loading.load(tiny_llama)
    before = outputs(model)
    layers = anneal_rank.factorize(model, context(tiny_llama, text_file), "anneal_rank")
    assert len(layers) == 4 * 7
    assert (outputs(model) - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("stage", [0, 2])
def test_the_truncation_at_the_end_removes_nothing(stage: int, tiny_llama: Path, text_file: Path) -> None:
    step = AnnealRank(keep=0.4, steps=4, learning_rate=3e-3)
    model = loading.load(tiny_llama)
    given = dataclasses.replace(context(tiny_llama, text_file), sharing=Sharing(stage))
    layers = anneal_rank.factorize(model, given, step.name())
    ranks = {
        name: low_rank.rank_of(0.4, layer.u.out_features, layer.v.in_features)
        for name, layer in layers.items()
    }

    def close(done: int) -> None:
        for name, layer in layers.items():
            layer.close(ranks[name], done / 4)

    before = {name: layer.u.weight[:, : ranks[name]].clone() for name, layer in layers.items()}
    schedule.learn(model, step, given, close)
    trained = outputs(model)
    assert all(len(layer.gates) == ranks[name] for name, layer in layers.items())
    assert not any(
        torch.equal(before[name], layer.u.weight[:, : ranks[name]]) for name, layer in layers.items()
    )
    anneal_rank.truncate(model, layers, ranks)
    torch.testing.assert_close(outputs(model), trained, rtol=0, atol=1e-2)
    assert (outputs(model) - trained).norm() < 1e-3 * trained.norm()
    assert {type(layer) for layer in model.module.modules()} & {LowRankLinear, GatedLinear} == {LowRankLinear}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_linear_has_the_rank_that_the_budget_gives_it(
    allocation: str, tiny_llama: Path, text_file: Path
) -> None:
    given, step = context(tiny_llama, text_file), AnnealRank(keep=0.4, allocation=allocation, steps=2)
    made = step.compress(loading.load(tiny_llama), given).layout()
    plain = SvdLlm(keep=0.4, allocation=allocation).compress(loading.load(tiny_llama), given).layout()
    assert made == plain
    if allocation == "uniform":
        name = "model.layers.0.mlp.up_proj"
        rank = int(0.4 * 64 * 160 / (64 + 160))
        assert made.linears[f"{name}.v"].out_features == made.linears[f"{name}.u"].in_features == rank


def test_it_comes_nearer_to_the_original_than_svd_llm(tiny_llama: Path, text_file: Path) -> None:
    given = context(tiny_llama, text_file)
    made = AnnealRank(keep=0.4, steps=60, batch=8, learning_rate=2e-3).compress(
        loading.load(tiny_llama), given
    )
    plain = SvdLlm(keep=0.4).compress(loading.load(tiny_llama), given)
    assert apart(made, tiny_llama, text_file) < 0.8 * apart(plain, tiny_llama, text_file)


def test_keeping_all_changes_nothing() -> None:
    assert AnnealRank(keep=1.0).is_noop
