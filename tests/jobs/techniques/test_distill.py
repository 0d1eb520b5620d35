"""Distillation brings a damaged model nearer to the original, and leaves everything else as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.materials import TextSource
from jobs.models import loading
from jobs.models.layers import LowRankLinear
from jobs.models.model import DTYPE, Model
from jobs.techniques.distill import Distill
from jobs.techniques.drop_layers import keep_blocks
from jobs.training import hidden_states
from jobs.training.losses import DistillationObjective, Divergence, distillation_loss

Tiny = Callable[..., Path]


def context(original: Path, text_file: Path, seed: int = 0) -> Context:
    return Context(
        statistics=cast(Statistics, None),
        workdir=original,
        seed=seed,
        training=data.windows_for(TextSource(str(text_file), 32, 32), original),
        teacher=lambda: loading.load(original),
        teacher_statistics=Statistics(None, "original"),
    )


def damaged(folder: Path) -> Model:
    """The model without its second block."""
    model = loading.load(folder)
    keep_blocks(model, [index for index in range(len(model.blocks)) if index != 1])
    return model


def apart(model: Model, original: Path, text_file: Path) -> float:
    """The mean KL divergence (or, for an encoder, squared distance) between a model and the original."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    with torch.no_grad():
        if model.task == "causal-lm":
            said = model.module(rows).logits.float().log_softmax(-1)
            taught = loading.load(original).module(rows).logits.float().log_softmax(-1)
            return nn.functional.kl_div(said, taught, log_target=True, reduction="batchmean").item()
        said = model.module(rows).last_hidden_state.float()
        return nn.functional.mse_loss(
            said, loading.load(original).module(rows).last_hidden_state.float()
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
    assert model.layout() == layout == step.output_layout(layout)
    assert {parameter.dtype for parameter in model.module.parameters()} == {DTYPE}
    assert not model.module.training


def test_embeddings_stay_the_originals_and_tied_to_the_head(tiny_llama: Path, text_file: Path) -> None:
    model = damaged(tiny_llama)
    Distill(steps=3).compress(model, context(tiny_llama, text_file))
    embedding = model.module.get_submodule("model.embed_tokens").weight
    assert model.module.get_submodule("lm_head").weight is embedding
    assert torch.equal(embedding, loading.load(tiny_llama).module.get_submodule("model.embed_tokens").weight)


def test_factored_linears_are_trained_and_stay_factored(tiny_llama: Path, text_file: Path) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    v, u = (nn.Linear(*shape, bias=False, dtype=DTYPE) for shape in ((64, 8), (8, 160)))
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


@pytest.mark.parametrize("divergence", ["reverse", "symmetric"])
def test_each_divergence_falls_where_it_is_what_is_trained(
    divergence: Divergence, tiny_llama: Path, text_file: Path
) -> None:
    rows = data.windows_for(TextSource(str(text_file), 8, 32, part=(0.5, 1.0)), tiny_llama)

    def distance(model: Model) -> float:
        with torch.no_grad():
            said, taught = (
                one.module(rows).logits.float().flatten(0, 1) for one in (model, loading.load(tiny_llama))
            )
            return distillation_loss(said, taught, None, DistillationObjective(divergence)).item()

    model = damaged(tiny_llama)
    before = distance(model)
    step = Distill(divergence=divergence, learning_rate=3e-3, steps=60, batch=8, hard_weight=0.0)
    step.compress(model, context(tiny_llama, text_file))
    assert distance(model) < 0.9 * before


def test_a_teacher_cached_whole_teaches_as_one_that_runs_beside(tiny_llama: Path, text_file: Path) -> None:
    def blocks(top_k: int) -> torch.Tensor:
        model = damaged(tiny_llama)
        step = Distill(top_k=top_k, steps=8, batch=2, learning_rate=1e-3, temperature=2.0)
        step.compress(model, context(tiny_llama, text_file))
        return model.blocks[0].mlp.up_proj.weight.float()

    untaught = damaged(tiny_llama).blocks[0].mlp.up_proj.weight.float()
    beside, whole, cut = blocks(0), blocks(512), blocks(8)
    moved = (beside - untaught).norm()
    assert (whole - beside).norm() < 0.1 * moved
    assert (cut - beside).norm() > 2 * (whole - beside).norm()


def test_the_teacher_is_asked_once_for_all_students_and_only_of_rows_they_meet(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    loaded: list[Model] = []

    def teacher() -> Model:
        loaded.append(loading.load(tiny_llama))
        return loaded[-1]

    def train(steps: int) -> None:
        shared = dataclasses.replace(
            context(tiny_llama, text_file),
            training=data.windows_for(TextSource(str(text_file), 96, 16), tiny_llama),
            teacher=teacher,
            teacher_statistics=Statistics(tmp_path, "original"),
        )
        Distill(top_k=4, steps=steps, learning_rate=1e-3).compress(damaged(tiny_llama), shared)

    def rows() -> int:
        return sum(len(load_file(file)) // 3 for file in tmp_path.iterdir())

    for steps, times, met in ((2, 1, 8), (3, 1, 8), (9, 2, 16), (70, 3, 96)):
        train(steps)
        assert (len(loaded), rows()) == (times, met)


def test_more_tokens_than_the_teacher_knows_cannot_be_kept(tiny_llama: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match=r"top_k=513 is outside \[0, 512\]"):
        Distill(top_k=513, steps=1).compress(damaged(tiny_llama), context(tiny_llama, text_file))


@pytest.mark.parametrize("name", ["hidden_weight", "attention_weight"])
def test_states_cannot_be_matched_with_a_cached_teacher(name: str, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=f"top_k=4.*{name}=1 must be 0"):
        Distill.of({"top_k": 4, name: 1.0}).output_layout(loading.original_layout(tiny_llama))


@pytest.mark.parametrize("cached", [0, 4])
def test_a_teacher_of_another_vocabulary_is_refused(
    cached: int, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    config = loading.load(tiny_llama).config
    config.vocab_size = 520
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="student's vocabulary has 520 tokens, the teacher's 512"):
        Distill(steps=1, top_k=cached).compress(loading.load(tmp_path), context(tiny_llama, text_file))


def test_a_classifier_learns_the_teachers_classes(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    sure = loading.load(tiny("bert", "classification"))
    sure.module.get_submodule("classifier").weight.mul_(30)
    loading.save(sure, tmp_path, {})
    rows = data.windows_for(TextSource(str(text_file), 32, 32), tmp_path)

    def distance(model: Model) -> float:
        with torch.no_grad():
            taught = loading.load(tmp_path).answer(rows).float()
            return distillation_loss(model.answer(rows).float(), taught, None, DistillationObjective()).item()

    model = loading.load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.blocks.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    before = distance(model)
    Distill(steps=30, batch=4, learning_rate=1e-3).compress(model, context(tmp_path, text_file))
    assert distance(model) < 0.5 * before


def test_hidden_states_and_attention_are_matched_where_they_have_weight(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    looking = loading.load(tiny_llama)
    for block in looking.blocks:
        block.self_attn.q_proj.weight.mul_(100)
    loading.save(looking, tmp_path, {})
    rows = data.windows_for(TextSource(str(text_file), 8, 32), tmp_path)

    def distances(weight: float) -> tuple[float, float]:
        model, teacher = damaged(tmp_path), loading.load(tmp_path)
        step = Distill(steps=20, batch=4, learning_rate=1e-3, hidden_weight=weight, attention_weight=weight)
        step.compress(model, context(tmp_path, text_file))
        assert not any(part._forward_hooks for part in model.module.modules())
        with (
            torch.no_grad(),
            hidden_states.read(model, hidden=True, attention=True) as own,
            hidden_states.read(teacher, hidden=True, attention=True) as others,
        ):
            model.module(rows)
            teacher.module(rows)
            return hidden_states.hidden_distance(own, others).item(), hidden_states.attention_distance(
                own, others
            ).item()

    without, wanted = distances(0.0), distances(50.0)
    assert wanted[0] < without[0]
    assert wanted[1] < 0.9 * without[1]


def test_training_ends_early_where_held_out_rows_gain_nothing_and_says_so(
    tiny_llama: Path, text_file: Path
) -> None:
    given = context(tiny_llama, text_file)
    # Nothing to learn from itself: steps can only do harm.
    model = loading.load(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    Distill(steps=100, learning_rate=3e-3, hard_weight=0.0, patience=2).compress(model, given)
    assert given.notes["steps_taken"] == 10
    assert len(given.notes["held_out_losses"]) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


def test_no_steps_change_nothing() -> None:
    assert Distill(steps=0).is_noop
    assert not Distill(steps=1).is_noop
