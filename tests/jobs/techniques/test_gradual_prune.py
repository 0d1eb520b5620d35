"""Gradual pruning: what goes when, exact numbers in the end, and a training that can be interrupted."""

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
def apart(model: Model, original: Path, text_file: Path) -> float:
    """The mean KL divergence from the original on text that training never saw."""
    rows = data.windows_for(TextSource(str(text_file), 16, 32, part=(0.5, 1.0)), original)
    said, taught = (one.answer(rows).float().log_softmax(-1) for one in (model, loading.load(original)))
    return nn.functional.kl_div(said, taught, log_target=True, reduction="batchmean").item()


def weights_of(model: Model) -> dict[str, Tensor]:
    return {
        name: layer.weight() for name, layer in model.linears().items() if isinstance(layer, SparseLinear)
    }


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_share_of_what_will_go_is_gone_the_smallest_first(pattern: str) -> None:
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    target = Sparsity(0.5, pattern)
    final = target.mask_by_linear(scores)
    lost = scores[~final].sort().values
    assert bool(mask_at(0.0, scores, target).all())
    assert torch.equal(mask_at(1.0, scores, target), final)
    quarter = mask_at(0.25, scores, target)
    assert torch.equal(scores[~quarter].sort().values, lost[:12])


@pytest.mark.parametrize(("pattern", "stage"), [("unstructured", 0), ("2:4", 0), ("unstructured", 2)])
def test_what_is_stored_is_what_was_trained_with_exact_numbers(
    pattern: str, stage: int, tiny_llama: Path, text_file: Path
) -> None:
    step = GradualPrune(sparsity=0.7, pattern=pattern, steps=6, learning_rate=3e-3)
    given = dataclasses.replace(context(tiny_llama, text_file), sharing=Sharing(stage))
    made = step.compress(loading.load(tiny_llama), given)
    expected = step.output_layout(loading.original_layout(tiny_llama))
    assert made.layout() == expected
    original = loading.load(tiny_llama).linears()
    for name, weight in weights_of(made).items():
        spec = expected.linears[name]
        removed = spec.in_features // 2 if pattern == "2:4" else int(0.7 * spec.in_features)
        assert spec.kept == spec.out_features * (spec.in_features - removed)
        assert int(weight.count_nonzero()) == spec.kept
        assert not torch.equal(weight[weight != 0], original[name].get_parameter("weight")[weight != 0])
        if pattern == "2:4":
            assert int(weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1).max()) == 2


def test_a_weight_that_is_masked_is_not_trained(tiny_llama: Path, text_file: Path) -> None:
    """Without a ramp the masks are magnitude's, from the first step on."""
    step = GradualPrune(sparsity=0.6, ramp=0.0, steps=5, learning_rate=1e-2)
    made = weights_of(step.compress(loading.load(tiny_llama), context(tiny_llama, text_file)))
    plain = weights_of(
        Magnitude(sparsity=0.6).compress(loading.load(tiny_llama), context(tiny_llama, text_file))
    )
    assert made.keys() == plain.keys()
    for name, weight in made.items():
        assert torch.equal(weight == 0, plain[name] == 0)
        assert not torch.equal(weight, plain[name])


def test_it_comes_nearer_to_the_original_than_magnitude(tiny_llama: Path, text_file: Path) -> None:
    given = context(tiny_llama, text_file)
    made = GradualPrune(sparsity=0.7, steps=60, batch=8, learning_rate=2e-3).compress(
        loading.load(tiny_llama), given
    )
    plain = Magnitude(sparsity=0.7).compress(loading.load(tiny_llama), given)
    assert apart(made, tiny_llama, text_file) < 0.8 * apart(plain, tiny_llama, text_file)


class Interrupted(Exception):  # noqa: N818 - it is no error of the training
    pass


def test_interrupted_between_two_choices_it_ends_with_the_same_weights(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Checkpoints are written every 50 steps, and masks chosen every 3: those of step 48 must be in it."""
    step = GradualPrune(sparsity=0.7, steps=72, ramp=0.9, learning_rate=3e-3)
    given = context(tiny_llama, text_file)
    whole = weights_of(step.compress(loading.load(tiny_llama), given))

    def interrupt(share: float, what: str) -> None:
        if what.startswith("step 60 "):
            raise Interrupted

    again = dataclasses.replace(given, checkpoints=tmp_path / "checkpoints")
    with contextlib.suppress(Interrupted):
        step.compress(loading.load(tiny_llama), dataclasses.replace(again, report=interrupt))
    made = weights_of(step.compress(loading.load(tiny_llama), again))
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], whole[name]) for name in whole)


def test_a_sparse_model_learns_on_with_its_zeros_kept(tiny_llama: Path, text_file: Path) -> None:
    given = context(tiny_llama, text_file)
    model = Magnitude(sparsity=0.7).compress(loading.load(tiny_llama), given)
    layout, before, far = model.layout(), weights_of(model), apart(model, tiny_llama, text_file)
    with masks.trainable(model):
        assert not weights_of(model)
        schedule.learn(model, GradualPrune(steps=60, batch=8, learning_rate=2e-3), given)
    assert model.layout() == layout
    assert apart(model, tiny_llama, text_file) < 0.9 * far
    for name, weight in weights_of(model).items():
        assert torch.equal(weight == 0, before[name] == 0)


def test_without_sparsity_it_changes_nothing() -> None:
    assert GradualPrune(sparsity=0.0).is_noop
    assert not GradualPrune(sparsity=0.0, pattern="2:4").is_noop
