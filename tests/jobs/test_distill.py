"""Distillation brings a damaged model nearer to the original, and leaves everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from jobs import data, models
from jobs.context import Context
from jobs.job import TextSource
from jobs.layers import LowRankLinear
from jobs.models import Model
from jobs.statistics import Statistics
from jobs.techniques.distill import Distill, distillation_loss


def context(original: Path, text_file: Path, seed: int = 0) -> Context:
    return Context(
        statistics=cast(Statistics, None),
        workdir=original,
        seed=seed,
        training=data.windows_for(TextSource(str(text_file), 32, 32), original),
        teacher=lambda: models.load(original),
    )


def damaged(folder: Path) -> Model:
    """The model without its second block."""
    model = models.load(folder)
    del model.blocks[1]
    for index, block in enumerate(model.blocks):
        if hasattr(block, "self_attn"):
            block.self_attn.layer_idx = index
    return model


def apart(model: Model, original: Path, text_file: Path) -> float:
    """The mean KL divergence (or, for an encoder, squared distance) between a model and the original."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    with torch.no_grad():
        if model.task == "causal-lm":
            said = model.module(rows).logits.float().log_softmax(-1)
            taught = models.load(original).module(rows).logits.float().log_softmax(-1)
            return nn.functional.kl_div(said, taught, log_target=True, reduction="batchmean").item()
        said = model.module(rows).last_hidden_state.float()
        return nn.functional.mse_loss(
            said, models.load(original).module(rows).last_hidden_state.float()
        ).item()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_a_damaged_model_comes_nearer_to_the_original(
    name: str, text_file: Path, request: pytest.FixtureRequest
) -> None:
    original = request.getfixturevalue(name)
    model = damaged(original)
    before, layout = apart(model, original, text_file), model.layout()
    step = Distill(learning_rate=3e-3, steps=120, batch=8, temperature=1.0, hard_weight=0.0)
    assert step.compress(model, context(original, text_file)) is model
    assert apart(model, original, text_file) < 0.8 * before
    assert model.layout() == layout == step.outline(layout)
    assert {parameter.dtype for parameter in model.module.parameters()} == {models.DTYPE}
    assert not model.module.training


def test_embeddings_stay_the_originals_and_tied_to_the_head(tiny_llama: Path, text_file: Path) -> None:
    model = damaged(tiny_llama)
    Distill(steps=3).compress(model, context(tiny_llama, text_file))
    embedding = model.module.get_submodule("model.embed_tokens").weight
    assert model.module.get_submodule("lm_head").weight is embedding
    assert torch.equal(embedding, models.load(tiny_llama).module.get_submodule("model.embed_tokens").weight)


def test_factored_linears_are_trained_and_stay_factored(tiny_llama: Path, text_file: Path) -> None:
    model = models.load(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    v, u = (nn.Linear(*shape, bias=False, dtype=models.DTYPE) for shape in ((64, 8), (8, 160)))
    model.replace(name, LowRankLinear(v, u).requires_grad_(False))
    before = v.weight.clone()
    layout = model.layout()
    Distill(steps=5, learning_rate=1e-3).compress(model, context(tiny_llama, text_file))
    assert model.layout() == layout
    assert not torch.equal(model.module.get_submodule(f"{name}.v").weight, before)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_llama: Path, text_file: Path
) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = damaged(tiny_llama)
        Distill(steps=3, learning_rate=1e-3).compress(model, context(tiny_llama, text_file, seed))
        return model.blocks[0].mlp.up_proj.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.0), (3.0, 0.25), (2.0, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(temperature: float, hard_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(300, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(300, 11, generator=generator)
    targets = torch.randint(11, (300,), generator=generator)
    plain = student.detach().clone().requires_grad_()
    soft = nn.functional.kl_div(
        (plain / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    hard = nn.functional.cross_entropy(plain, targets)
    expected = (1 - hard_weight) * temperature**2 * soft + hard_weight * hard
    loss = distillation_loss(student, teacher, targets, temperature, hard_weight)
    (3 * expected).backward()
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, plain.grad)


def test_no_steps_change_nothing() -> None:
    assert Distill(steps=0).identity
    assert not Distill(steps=1).identity
