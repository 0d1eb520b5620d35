"""Quantization-aware training: gradients equal hand-worked cases, and the stored model equals the trained one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.compression import grids
from jobs.context import Context
from jobs.materials import TextSource
from jobs.models import loading
from jobs.models.layout import Packing
from jobs.models.model import Model
from jobs.parallel import Sharing
from jobs.techniques.qat import Qat, RoundedWeight, pack, round_in_forward
from jobs.techniques.svd_llm import SvdLlm
from jobs.training import schedule

TWO_BITS = Packing(2, 32, symmetric=False)


def context(original: Path, text_file: Path) -> Context:
    rows = data.windows_for(TextSource(str(text_file), 32, 32), original)
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


def test_weights_inside_the_grid_get_the_full_gradient_and_others_none() -> None:
    weight = torch.tensor([[0.3, 5.0, -2.0, 1.6]], requires_grad=True)
    part = RoundedWeight(weight.detach(), Packing(2, 0, symmetric=False)).float().requires_grad_()
    part.start.fill_(1.0)
    part.zeros.fill_(1.0)  # the grid is −1, 0, 1, 2
    rounded = part(weight)
    assert rounded.tolist() == [[0, 2, -1, 2]]
    (rounded * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert weight.grad is not None
    assert part.change.grad is not None
    assert weight.grad.tolist() == [[1, 0, 0, 1000]]
    # LSQ, eq. 3: (0 − 0.3) · 1 + 2 · 10 − 1 · 100 + (2 − 1.6) · 1000. The scale s is 1, so the gradients by s and
    # log s are equal.
    assert part.change.grad.item() == pytest.approx(-0.3 + 20 - 100 + 400, rel=1e-5)


def test_the_scale_is_trained_by_its_logarithm() -> None:
    weight = torch.tensor([[0.15, 2.5, -1.0, 0.8]])
    part = RoundedWeight(weight, Packing(2, 0, symmetric=False)).float().requires_grad_()
    part.start.fill_(0.25)
    part.zeros.fill_(1.0)
    with torch.no_grad():
        part.change.fill_(torch.tensor(2.0).log().item())  # the case above at half the scale
    (part(weight) * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert part.change.grad is not None
    assert part.change.grad.item() == pytest.approx(0.5 * (-0.3 + 20 - 100 + 400), rel=1e-4)


@pytest.mark.parametrize("packing", [Packing(3, 64, False), Packing(4, 128, True), Packing(2, 0, False)])
def test_a_forward_pass_rounds_to_the_stored_grid(packing: Packing) -> None:
    """With 96 inputs, the second of two groups of 64 is incomplete."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    part = RoundedWeight(weight, packing)
    part.change.copy_(0.1 * torch.randn(part.change.shape, generator=torch.Generator().manual_seed(1)))
    integers, grid = part.integers(weight)
    assert torch.equal(grid.scales, grid.scales.half().float())
    values = grid.values(grids.grouped(integers - 0.0, packing))
    assert torch.equal(part(weight), values.flatten(1)[:, :96].bfloat16())
    fitted = grids.fit(
        grids.grouped(weight.float(), packing), packing, torch.ones(grid.scales.shape[1], packing.group or 96)
    )
    assert not torch.equal(fitted.scales, grid.scales)
    assert torch.equal(fitted.zeros, grid.zeros)


@pytest.mark.parametrize(("symmetric", "stage"), [(False, 0), (True, 0), (False, 2)])
def test_the_packed_model_equals_the_trained_one(
    symmetric: bool, stage: int, tiny_llama: Path, text_file: Path
) -> None:
    step = Qat(bits=3, group=32, symmetric=symmetric, steps=4, learning_rate=1e-2)
    model = loading.load(tiny_llama)
    round_in_forward(model, step.packing, "qat")
    initial_outputs = compute_outputs(model)
    sharded_context = dataclasses.replace(context(tiny_llama, text_file), sharing=Sharing(stage))
    schedule.learn(model, step, sharded_context)
    trained = compute_outputs(model)
    parts = [part for part in model.module.modules() if isinstance(part, RoundedWeight)]
    assert len(parts) == len(model.linears())
    assert all(part.change.any() for part in parts)
    pack(model, step.packing)
    assert torch.equal(compute_outputs(model), trained)
    assert not torch.equal(trained, initial_outputs)
    assert model.layout() == step.output_layout(loading.original_layout(tiny_llama))
    assert not any(parametrize.is_parametrized(part) for part in model.module.modules())


def test_training_brings_the_rounded_model_closer_to_the_original(tiny_llama: Path, text_file: Path) -> None:
    untrained = loading.load(tiny_llama)
    round_in_forward(untrained, TWO_BITS, "qat")
    pack(untrained, TWO_BITS)
    step = Qat(bits=2, group=32, steps=60, batch=8, learning_rate=3e-4)
    trained = step.compress(loading.load(tiny_llama), context(tiny_llama, text_file))
    assert divergence_from_original(trained, tiny_llama, text_file) < 0.6 * divergence_from_original(
        untrained, tiny_llama, text_file
    )


def test_factored_linears_and_tables_are_packed(tiny_llama: Path, text_file: Path) -> None:
    shared_context = context(tiny_llama, text_file)
    model = SvdLlm(keep=0.5).compress(loading.load(tiny_llama), shared_context)
    step = Qat(bits=4, embedding_bits=8, steps=1)
    expected = step.output_layout(model.layout())
    assert step.compress(model, shared_context).layout() == expected
    assert {spec.packing for spec in expected.linears.values()} == {Packing(4, 64, symmetric=False)}
    assert {spec.packing for spec in expected.tables.values()} == {Packing(8, 0, symmetric=False)}


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"qat\.steps=0 is outside whole numbers in \[1, 100000\]"):
        Qat(steps=0)
