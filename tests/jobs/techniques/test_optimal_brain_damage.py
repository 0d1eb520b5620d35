"""Optimal brain damage: saliencies are checked on quadratic losses, and masks against slow implementations."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from jobs import run, techniques
from jobs.calibration.statistics import Statistics
from jobs.compression.importance import fisher
from jobs.compression.sparsity import Sparsity, highest
from jobs.context import Context
from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.optimal_brain_damage import OptimalBrainDamage, damped, saliency


def context(workdir: Path, samples: int = 8) -> Context:
    tokens = torch.randint(3, 512, (samples, 32), generator=torch.Generator().manual_seed(0))
    return Context(Statistics(workdir, "parent"), workdir, seed=0, calibration=tokens)


def test_on_a_quadratic_loss_the_saliency_is_exact_and_the_choice_optimal() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    curvature = torch.rand(2, 4, generator=generator, dtype=torch.float64) ** 3

    def loss_increase(removed: Tensor) -> float:
        """Return the rise of the loss ½ Σ h (v − w)², whose minimum is at v = w, with the removed v set to zero."""
        pruned = weight.masked_fill(removed, 0)
        return (0.5 * curvature * (pruned - weight) ** 2).sum().item()

    saliencies = saliency(weight, curvature)
    for index in range(8):
        single = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(index), True).view(2, 4)
        assert saliencies[single].item() == pytest.approx(loss_increase(single))
    actual = loss_increase(~Sparsity(0.5).mask_by_linear(saliencies))
    increases = []
    for chosen in combinations(range(8), 4):
        removed = torch.zeros(8, dtype=torch.bool)
        removed[list(chosen)] = True
        increases.append(loss_increase(removed.view(2, 4)))
    assert actual == pytest.approx(min(increases))
    assert actual < 0.9 * sum(increases) / len(increases)


def test_a_huge_weight_without_curvature_has_no_saliency() -> None:
    assert saliency(torch.tensor([[3e38]]), torch.tensor([[0.0]])).item() == 0


def test_a_row_without_curvature_gets_a_share_of_the_column_means() -> None:
    information = torch.tensor([[6.0, 0.6], [0.0, 0.0]])
    # The columns' means are 3 and 0.3; 0.3 of them is added.
    assert torch.allclose(damped(information), torch.tensor([[6.9, 0.69], [0.9, 0.09]]))


def test_a_saturated_neuron_keeps_weights() -> None:
    """GELU has no slope at a pre-activation of −9, but removing weights changes that pre-activation."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator) + 1
    weight = torch.randn(8, 16, generator=generator) / 4
    weight[0] = -9 / inputs.sum(dim=1).mean()
    weight.requires_grad_(True)
    bias = torch.zeros(8)
    bias[0] = 3
    information = torch.zeros_like(weight)
    for row in inputs:
        output = torch.nn.functional.gelu(weight @ row + bias).sum()
        information += torch.autograd.grad(output, weight)[0].square() / 64

    def output_error(scores: Tensor) -> float:
        pruned = weight.detach() * Sparsity(0.25).mask_by_linear(scores)
        expected = torch.nn.functional.gelu(inputs @ weight.detach().T + bias)
        actual = torch.nn.functional.gelu(inputs @ pruned.T + bias)
        return (actual - expected).square().mean().item()

    detached = weight.detach()
    assert output_error(saliency(detached, damped(information))) < 0.3 * output_error(
        saliency(detached, information)
    )


def test_each_linear_keeps_its_most_salient_weights(tiny_llama: Path, tmp_path: Path) -> None:
    original = loading.load(tiny_llama)
    information = fisher(original, context(tmp_path))
    model = OptimalBrainDamage(sparsity=0.7).compress(loading.load(tiny_llama), context(tmp_path))
    for name, layer in model.linears().items():
        weight = original.linears()[name].get_parameter("weight")
        scores = damped(information[name]).double() * weight.double() ** 2
        mask = layer.kept()
        assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-5)
        assert torch.equal(layer.weight(), torch.where(mask, weight, 0))


def test_with_model_scope_all_weights_compete_and_each_row_keeps_its_best(
    tiny_llama: Path, tmp_path: Path
) -> None:
    original = loading.load(tiny_llama)
    # A block with tiny outputs would lose all its weights.
    original.blocks[1].mlp.down_proj.weight.data.mul_(1e-4)
    information = fisher(original, context(tmp_path))
    linears = original.linears()
    weights = {name: layer.get_parameter("weight").detach().clone() for name, layer in linears.items()}
    scores = {}
    for name, weight in weights.items():
        scores[name] = saliency(weight.float(), damped(information[name]))
        rows = torch.arange(len(weight))
        scores[name][rows, scores[name].argmax(dim=1)] = torch.inf
    step = OptimalBrainDamage(sparsity=0.8, scope="model")
    layout = step.output_layout(original.layout())
    model = step.compress(original, context(tmp_path))
    joint_mask = highest(
        torch.cat([linear_scores.flatten() for linear_scores in scores.values()]), count_kept(layout)
    )
    for expected_mask, (name, weight) in zip(
        joint_mask.split([weight.numel() for weight in weights.values()]), weights.items(), strict=True
    ):
        layer = model.linears()[name]
        assert torch.equal(layer.kept().flatten(), expected_mask)
        assert layer.kept().any(dim=1).all()
        assert torch.equal(layer.weight(), torch.where(layer.kept(), weight, 0))
    shares = {
        layer.spec.kept / layer.spec.in_features / layer.spec.out_features
        for layer in model.linears().values()
    }
    assert max(shares) > 2 * min(shares)


def count_kept(layout: loading.Layout) -> int:
    return sum(spec.kept or 0 for spec in layout.linears.values())


@pytest.mark.parametrize("share", [0.005, 0.01, 0.5, 0.95])
def test_with_model_scope_the_predicted_layout_has_the_same_names_and_weight_count(
    share: float, tiny_llama: Path, tmp_path: Path
) -> None:
    step = OptimalBrainDamage(sparsity=share, scope="model")
    assert not step.exact
    assert OptimalBrainDamage(sparsity=share).exact
    model = loading.load(tiny_llama)
    expected = step.output_layout(model.layout())
    layout = run._compressed(model, step, context(tmp_path)).layout()
    assert layout.tensors().keys() == expected.tensors().keys()
    assert count_kept(layout) == count_kept(expected)
    loading.save(model, tmp_path / "made", {})
    loaded = loading.load(tmp_path / "made")
    assert loaded.layout() == layout
    with torch.no_grad():
        tokens = torch.arange(3, 19).unsqueeze(0)
        assert torch.equal(loaded.module(tokens).logits, model.module(tokens).logits)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_it_changes_the_predictions_less_than_magnitude(scope: str, tiny_llama: Path, tmp_path: Path) -> None:
    def load_uneven_model() -> Model:
        model = loading.load(tiny_llama)
        # Half of the inputs and of the neurons' outputs are weak, which the pruned weights do not show.
        for block in model.blocks:
            block.input_layernorm.weight.data[::2] = 0.05
            block.post_attention_layernorm.weight.data[::2] = 0.05
            block.mlp.down_proj.weight.data[:, ::2] *= 0.05
        return model

    calibrated_context = context(tmp_path, samples=128)
    assert calibrated_context.calibration is not None
    expected = predict(load_uneven_model(), calibrated_context.calibration)
    pruned_by_saliency = OptimalBrainDamage(sparsity=0.3, scope=scope).compress(
        load_uneven_model(), calibrated_context
    )
    pruned_by_magnitude = (
        techniques.load("magnitude").of({"sparsity": 0.3}).compress(load_uneven_model(), calibrated_context)
    )
    divergences = [
        kl_div(
            predict(model, calibrated_context.calibration), expected, reduction="sum", log_target=True
        ).item()
        for model in (pruned_by_saliency, pruned_by_magnitude)
    ]
    assert divergences[0] < 0.7 * divergences[1]


@torch.no_grad()
def predict(model: Model, rows: Tensor) -> Tensor:
    log_probabilities: Tensor = model.module(rows).logits.double().log_softmax(dim=-1)
    return log_probabilities
