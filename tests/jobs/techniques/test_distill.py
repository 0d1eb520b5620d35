"""Distillation brings a damaged model closer to the original and leaves its layout unchanged."""

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


def load_damaged(folder: Path) -> Model:
    """Load the model without its second block."""
    model = loading.load(folder)
    keep_blocks(model, [index for index in range(len(model.blocks)) if index != 1])
    return model


def distance_to_original(model: Model, original: Path, text_file: Path) -> float:
    """Return the mean KL divergence (for an encoder: the squared distance) from the original."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    with torch.no_grad():
        if model.task == "causal-lm":
            student = model.module(rows).logits.float().log_softmax(-1)
            teacher = loading.load(original).module(rows).logits.float().log_softmax(-1)
            return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").item()
        student = model.module(rows).last_hidden_state.float()
        return nn.functional.mse_loss(
            student, loading.load(original).module(rows).last_hidden_state.float()
        ).item()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_distillation_brings_a_damaged_model_closer_to_the_original(
    name: str, text_file: Path, request: pytest.FixtureRequest
) -> None:
    original = request.getfixturevalue(name)
    model = load_damaged(original)
    initial_distance, layout = distance_to_original(model, original, text_file), model.layout()
    step = Distill(learning_rate=3e-3, steps=120, batch=8, temperature=1.0, hard_weight=0.0)
    assert step.compress(model, context(original, text_file)) is model
    assert distance_to_original(model, original, text_file) < 0.8 * initial_distance
    assert model.layout() == layout == step.output_layout(layout)
    assert {parameter.dtype for parameter in model.module.parameters()} == {DTYPE}
    assert not model.module.training


def test_embeddings_stay_unchanged_and_tied_to_the_head(tiny_llama: Path, text_file: Path) -> None:
    model = load_damaged(tiny_llama)
    Distill(steps=3).compress(model, context(tiny_llama, text_file))
    embedding = model.module.get_submodule("model.embed_tokens").weight
    assert model.module.get_submodule("lm_head").weight is embedding
    assert torch.equal(embedding, loading.load(tiny_llama).module.get_submodule("model.embed_tokens").weight)


def test_factored_linears_are_trained_and_stay_factored(tiny_llama: Path, text_file: Path) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    v, u = (nn.Linear(*shape, bias=False, dtype=DTYPE) for shape in ((64, 8), (8, 160)))
    model.replace(name, LowRankLinear(v, u).requires_grad_(False))
    initial_weight = v.weight.clone()
    layout = model.layout()
    Distill(steps=5, learning_rate=1e-3).compress(model, context(tiny_llama, text_file))
    assert model.layout() == layout
    assert not torch.equal(model.module.get_submodule(f"{name}.v").weight, initial_weight)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_llama: Path, text_file: Path
) -> None:
    def train_weights(seed: int) -> torch.Tensor:
        model = load_damaged(tiny_llama)
        Distill(steps=3, learning_rate=1e-3).compress(model, context(tiny_llama, text_file, seed))
        return model.blocks[0].mlp.up_proj.weight

    assert torch.equal(train_weights(0), train_weights(0))
    assert not torch.equal(train_weights(0), train_weights(1))


@pytest.mark.parametrize("divergence", ["reverse", "symmetric"])
def test_training_on_a_divergence_reduces_that_divergence(
    divergence: Divergence, tiny_llama: Path, text_file: Path
) -> None:
    rows = data.windows_for(TextSource(str(text_file), 8, 32, part=(0.5, 1.0)), tiny_llama)

    def distance(model: Model) -> float:
        with torch.no_grad():
            student = model.module(rows).logits.float().flatten(0, 1)
            teacher = loading.load(tiny_llama).module(rows).logits.float().flatten(0, 1)
            return distillation_loss(student, teacher, None, DistillationObjective(divergence)).item()

    model = load_damaged(tiny_llama)
    initial_distance = distance(model)
    step = Distill(divergence=divergence, learning_rate=3e-3, steps=60, batch=8, hard_weight=0.0)
    step.compress(model, context(tiny_llama, text_file))
    assert distance(model) < 0.9 * initial_distance


def test_caching_all_teacher_logits_equals_running_the_teacher(tiny_llama: Path, text_file: Path) -> None:
    def train_up_projection(top_k: int) -> torch.Tensor:
        model = load_damaged(tiny_llama)
        step = Distill(top_k=top_k, steps=8, batch=2, learning_rate=1e-3, temperature=2.0)
        step.compress(model, context(tiny_llama, text_file))
        return model.blocks[0].mlp.up_proj.weight.float()

    untrained = load_damaged(tiny_llama).blocks[0].mlp.up_proj.weight.float()
    with_teacher, with_all_logits, with_top_8 = (
        train_up_projection(0),
        train_up_projection(512),
        train_up_projection(8),
    )
    total_change = (with_teacher - untrained).norm()
    assert (with_all_logits - with_teacher).norm() < 0.1 * total_change
    assert (with_top_8 - with_teacher).norm() > 2 * (with_all_logits - with_teacher).norm()


def test_teacher_logits_are_computed_once_and_only_for_rows_in_use(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    teachers: list[Model] = []

    def teacher() -> Model:
        teachers.append(loading.load(tiny_llama))
        return teachers[-1]

    def train(steps: int) -> None:
        shared = dataclasses.replace(
            context(tiny_llama, text_file),
            training=data.windows_for(TextSource(str(text_file), 96, 16), tiny_llama),
            teacher=teacher,
            teacher_statistics=Statistics(tmp_path, "original"),
        )
        Distill(top_k=4, steps=steps, learning_rate=1e-3).compress(load_damaged(tiny_llama), shared)

    def count_cached_rows() -> int:
        return sum(len(load_file(file)) // 3 for file in tmp_path.iterdir())

    for steps, load_count, row_count in ((2, 1, 8), (3, 1, 8), (9, 2, 16), (70, 3, 96)):
        train(steps)
        assert (len(teachers), count_cached_rows()) == (load_count, row_count)


def test_a_top_k_above_the_vocabulary_size_is_refused(tiny_llama: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match=r"top_k=513 is outside \[0, 512\]"):
        Distill(top_k=513, steps=1).compress(load_damaged(tiny_llama), context(tiny_llama, text_file))


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
    confident = loading.load(tiny("bert", "classification"))
    confident.module.get_submodule("classifier").weight.mul_(30)
    loading.save(confident, tmp_path, {})
    rows = data.windows_for(TextSource(str(text_file), 32, 32), tmp_path)

    def distance(model: Model) -> float:
        with torch.no_grad():
            teacher = loading.load(tmp_path).answer(rows).float()
            return distillation_loss(
                model.answer(rows).float(), teacher, None, DistillationObjective()
            ).item()

    model = loading.load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.blocks.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    initial_distance = distance(model)
    Distill(steps=30, batch=4, learning_rate=1e-3).compress(model, context(tmp_path, text_file))
    assert distance(model) < 0.5 * initial_distance


def test_hidden_states_and_attention_are_matched_if_their_weight_is_positive(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    attentive = loading.load(tiny_llama)
    for block in attentive.blocks:
        block.self_attn.q_proj.weight.mul_(100)
    loading.save(attentive, tmp_path, {})
    rows = data.windows_for(TextSource(str(text_file), 8, 32), tmp_path)

    def distances(weight: float) -> tuple[float, float]:
        model, teacher = load_damaged(tmp_path), loading.load(tmp_path)
        step = Distill(steps=20, batch=4, learning_rate=1e-3, hidden_weight=weight, attention_weight=weight)
        step.compress(model, context(tmp_path, text_file))
        assert not any(part._forward_hooks for part in model.module.modules())
        with (
            torch.no_grad(),
            hidden_states.read(model, hidden=True, attention=True) as student_states,
            hidden_states.read(teacher, hidden=True, attention=True) as teacher_states,
        ):
            model.module(rows)
            teacher.module(rows)
            hidden = hidden_states.hidden_distance(student_states, teacher_states).item()
            return hidden, hidden_states.attention_distance(student_states, teacher_states).item()

    unmatched, matched = distances(0.0), distances(50.0)
    assert matched[0] < unmatched[0]
    assert matched[1] < 0.9 * unmatched[1]


def test_training_stops_early_without_held_out_progress_and_notes_it(
    tiny_llama: Path, text_file: Path
) -> None:
    noted_context = context(tiny_llama, text_file)
    # The model equals its teacher, so steps can only worsen it.
    model = loading.load(tiny_llama)
    initial_state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    Distill(steps=100, learning_rate=3e-3, hard_weight=0.0, patience=2).compress(model, noted_context)
    assert noted_context.notes["steps_taken"] == 10
    assert len(noted_context.notes["held_out_losses"]) == 3
    assert all(torch.equal(tensor, initial_state[name]) for name, tensor in model.module.state_dict().items())


def test_zero_steps_are_a_no_op() -> None:
    assert Distill(steps=0).is_noop
    assert not Distill(steps=1).is_noop
