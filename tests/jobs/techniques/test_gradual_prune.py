"""Gradual pruning: the order in which weights are removed, the exact numbers at the end, and interrupted training."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.compression import masks
from jobs.compression.sparsity import Sparsity
from jobs.context import Context
from jobs.materials import TextSource
from jobs.models import loading
from jobs.models.layers import SparseLinear
from jobs.models.model import Model
from jobs.parallel import Sharing
from jobs.techniques.gradual_prune import GradualPrune, mask_at
from jobs.techniques.magnitude import Magnitude
from jobs.training import schedule


def context(original: Path, text_file: Path) -> Context:
    return Context(
        Statistics(None, ""),
        original,
        0,
        training=data.windows_for(TextSource(str(text_file), 32, 32), original),
        teacher=lambda: loading.load(original),
    )


@torch.no_grad()
def divergence_from_original(model: Model, original: Path, text_file: Path) -> float:
    """Return the mean KL divergence from the original on text outside the training data."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    student = model.answer(rows).float().log_softmax(-1)
    teacher = loading.load(original).answer(rows).float().log_softmax(-1)
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").item()


def weights_of(model: Model) -> dict[str, Tensor]:
    return {
        name: layer.weight() for name, layer in model.linears().items() if isinstance(layer, SparseLinear)
    }


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_are_removed_in_order_of_their_scores(pattern: str) -> None:
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    target = Sparsity(0.5, pattern)
    final = target.mask_by_linear(scores)
    removed_scores = scores[~final].sort().values
    assert bool(mask_at(0.0, scores, target).all())
    assert torch.equal(mask_at(1.0, scores, target), final)
    quarter = mask_at(0.25, scores, target)
    assert torch.equal(scores[~quarter].sort().values, removed_scores[:12])


@pytest.mark.parametrize(("pattern", "stage"), [("unstructured", 0), ("2:4", 0), ("unstructured", 2)])
def test_stored_weights_are_trained_and_have_the_exact_sparsity(
    pattern: str, stage: int, tiny_llama: Path, text_file: Path
) -> None:
    step = GradualPrune(sparsity=0.7, pattern=pattern, steps=6, learning_rate=3e-3)
    sharded_context = dataclasses.replace(context(tiny_llama, text_file), sharing=Sharing(stage))
    model = step.compress(loading.load(tiny_llama), sharded_context)
    expected = step.output_layout(loading.original_layout(tiny_llama))
    assert model.layout() == expected
    original = loading.load(tiny_llama).linears()
    for name, weight in weights_of(model).items():
        spec = expected.linears[name]
        removed = int(0.7 * spec.in_features)
        if pattern == "2:4":
            removed = spec.in_features // 2
        assert spec.kept == spec.out_features * (spec.in_features - removed)
        assert int(weight.count_nonzero()) == spec.kept
        assert not torch.equal(weight[weight != 0], original[name].get_parameter("weight")[weight != 0])
        if pattern == "2:4":
            assert int(weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1).max()) == 2


def test_a_masked_weight_is_not_trained(tiny_llama: Path, text_file: Path) -> None:
    """Without a ramp the masks equal those of magnitude pruning from the first step."""
    step = GradualPrune(sparsity=0.6, ramp=0.0, steps=5, learning_rate=1e-2)
    weights = weights_of(step.compress(loading.load(tiny_llama), context(tiny_llama, text_file)))
    plain = weights_of(
        Magnitude(sparsity=0.6).compress(loading.load(tiny_llama), context(tiny_llama, text_file))
    )
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        assert torch.equal(weight == 0, plain[name] == 0)
        assert not torch.equal(weight, plain[name])


def test_the_model_is_closer_to_the_original_than_with_magnitude_pruning(
    tiny_llama: Path, text_file: Path
) -> None:
    shared_context = context(tiny_llama, text_file)
    trained = GradualPrune(sparsity=0.7, steps=60, batch=8, learning_rate=2e-3).compress(
        loading.load(tiny_llama), shared_context
    )
    plain = Magnitude(sparsity=0.7).compress(loading.load(tiny_llama), shared_context)
    assert divergence_from_original(trained, tiny_llama, text_file) < 0.8 * divergence_from_original(
        plain, tiny_llama, text_file
    )


class InterruptedTrainingError(Exception):
    pass


def test_a_training_interrupted_between_two_mask_choices_ends_with_the_same_weights(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """A checkpoint is written every 50 steps, masks are chosen every 3; the masks of step 48 must be stored."""
    step = GradualPrune(sparsity=0.7, steps=72, ramp=0.9, learning_rate=3e-3)
    plain_context = context(tiny_llama, text_file)
    expected = weights_of(step.compress(loading.load(tiny_llama), plain_context))

    def interrupt(share: float, activity: str) -> None:
        if activity.startswith("step 60 "):
            raise InterruptedTrainingError

    resumable_context = dataclasses.replace(plain_context, checkpoints=tmp_path / "checkpoints")
    with contextlib.suppress(InterruptedTrainingError):
        step.compress(loading.load(tiny_llama), dataclasses.replace(resumable_context, report=interrupt))
    resumed = weights_of(step.compress(loading.load(tiny_llama), resumable_context))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_training_a_sparse_model_keeps_its_zeros(tiny_llama: Path, text_file: Path) -> None:
    shared_context = context(tiny_llama, text_file)
    model = Magnitude(sparsity=0.7).compress(loading.load(tiny_llama), shared_context)
    layout, initial_weights, initial_divergence = (
        model.layout(),
        weights_of(model),
        divergence_from_original(model, tiny_llama, text_file),
    )
    with masks.trainable(model):
        assert not weights_of(model)
        schedule.learn(model, GradualPrune(steps=60, batch=8, learning_rate=2e-3), shared_context)
    assert model.layout() == layout
    assert divergence_from_original(model, tiny_llama, text_file) < 0.9 * initial_divergence
    for name, weight in weights_of(model).items():
        assert torch.equal(weight == 0, initial_weights[name] == 0)


def test_zero_sparsity_is_a_no_op() -> None:
    assert GradualPrune(sparsity=0.0).is_noop
    assert not GradualPrune(sparsity=0.0, pattern="2:4").is_noop
