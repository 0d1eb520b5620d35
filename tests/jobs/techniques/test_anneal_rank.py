"""Annealed ranks: gates equal the hand-worked case, both ends of the ramp lose nothing, and ranks are exact."""

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
def compute_outputs(model: Model) -> Tensor:
    return model.answer(torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def divergence_from_original(model: Model, original: Path, text_file: Path) -> float:
    """Return the mean KL divergence from the original on text outside the training data."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    student = model.answer(rows).float().log_softmax(-1)
    teacher = loading.load(original).answer(rows).float().log_softmax(-1)
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").item()


def make_gated(values: list[float]) -> GatedLinear:
    full = len(values)
    generator = torch.Generator().manual_seed(0)
    v, u = torch.randn(full, 7, generator=generator), torch.randn(6, full, generator=generator)
    return GatedLinear(linear_of(v, None), linear_of(u, torch.ones(6)), torch.tensor(values))


def test_values_beyond_the_rank_are_thresholded_and_the_weakest_close_first() -> None:
    layer = make_gated([8.0, 4.0, 2.0, 1.0])
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
    layer = make_gated([8.0, 4.0, 2.0, 1.0])
    layer.close(1, 0.25)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    weight = sum(
        gate * torch.outer(layer.u.weight[:, i], layer.v.weight[i]) for i, gate in enumerate([1, 0.75, 0.5])
    )
    torch.testing.assert_close(layer(x), x @ weight.T + 1)


def test_with_all_gates_open_the_outputs_do_not_change(tiny_llama: Path, text_file: Path) -> None:
    model = loading.load(tiny_llama)
    original_outputs = compute_outputs(model)
    layers = anneal_rank.factorize(model, context(tiny_llama, text_file), "anneal_rank")
    assert len(layers) == 4 * 7
    assert (compute_outputs(model) - original_outputs).norm() < 0.02 * original_outputs.norm()


@pytest.mark.parametrize("stage", [0, 2])
def test_the_final_truncation_does_not_change_the_outputs(
    stage: int, tiny_llama: Path, text_file: Path
) -> None:
    step = AnnealRank(keep=0.4, steps=4, learning_rate=3e-3)
    model = loading.load(tiny_llama)
    sharded_context = dataclasses.replace(context(tiny_llama, text_file), sharing=Sharing(stage))
    layers = anneal_rank.factorize(model, sharded_context, step.name())
    ranks = {
        name: low_rank.rank_of(0.4, layer.u.out_features, layer.v.in_features)
        for name, layer in layers.items()
    }

    def close(completed_steps: int) -> None:
        for name, layer in layers.items():
            layer.close(ranks[name], completed_steps / 4)

    initial_factors = {name: layer.u.weight[:, : ranks[name]].clone() for name, layer in layers.items()}
    schedule.learn(model, step, sharded_context, close)
    trained = compute_outputs(model)
    assert all(len(layer.gates) == ranks[name] for name, layer in layers.items())
    assert not any(
        torch.equal(initial_factors[name], layer.u.weight[:, : ranks[name]]) for name, layer in layers.items()
    )
    anneal_rank.truncate(model, layers, ranks)
    torch.testing.assert_close(compute_outputs(model), trained, rtol=0, atol=1e-2)
    assert (compute_outputs(model) - trained).norm() < 1e-3 * trained.norm()
    assert {type(layer) for layer in model.module.modules()} & {LowRankLinear, GatedLinear} == {LowRankLinear}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_ranks_equal_those_of_svd_llm_at_the_same_budget(
    allocation: str, tiny_llama: Path, text_file: Path
) -> None:
    shared_context, step = (
        context(tiny_llama, text_file),
        AnnealRank(keep=0.4, allocation=allocation, steps=2),
    )
    annealed = step.compress(loading.load(tiny_llama), shared_context).layout()
    plain = (
        SvdLlm(keep=0.4, allocation=allocation).compress(loading.load(tiny_llama), shared_context).layout()
    )
    assert annealed == plain
    if allocation == "uniform":
        name = "model.layers.0.mlp.up_proj"
        rank = int(0.4 * 64 * 160 / (64 + 160))
        assert annealed.linears[f"{name}.v"].out_features == annealed.linears[f"{name}.u"].in_features == rank


def test_the_model_is_closer_to_the_original_than_with_svd_llm(tiny_llama: Path, text_file: Path) -> None:
    shared_context = context(tiny_llama, text_file)
    annealed = AnnealRank(keep=0.4, steps=60, batch=8, learning_rate=2e-3).compress(
        loading.load(tiny_llama), shared_context
    )
    plain = SvdLlm(keep=0.4).compress(loading.load(tiny_llama), shared_context)
    assert divergence_from_original(annealed, tiny_llama, text_file) < 0.8 * divergence_from_original(
        plain, tiny_llama, text_file
    )


def test_keeping_everything_is_a_no_op() -> None:
    assert AnnealRank(keep=1.0).is_noop
