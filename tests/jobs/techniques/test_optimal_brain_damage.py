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


def test_on_a_quadratic_the_saliency_is_what_the_loss_rises_by_and_no_other_choice_costs_less() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    curvature = torch.rand(2, 4, generator=generator, dtype=torch.float64) ** 3

    def rise(removed: Tensor) -> float:
        """Of the loss ½ Σ h (v − w)², which is least at v = w, where some of v are zero."""
        there = weight.masked_fill(removed, 0)
        return (0.5 * curvature * (there - weight) ** 2).sum().item()

    found = saliency(weight, curvature)
    for place in range(8):
        one = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(place), True).view(2, 4)
        assert found[one].item() == pytest.approx(rise(one))
    ours = rise(~Sparsity(0.5).mask_by_linear(found))
    every = []
    for chosen in combinations(range(8), 4):
        removed = torch.zeros(8, dtype=torch.bool)
        removed[list(chosen)] = True
        every.append(rise(removed.view(2, 4)))
    assert ours == pytest.approx(min(every))
    assert ours < 0.9 * sum(every) / len(every)


def test_a_huge_weight_without_curvature_has_no_saliency() -> None:
    assert saliency(torch.tensor([[3e38]]), torch.tensor([[0.0]])).item() == 0


def test_a_row_without_curvature_counts_by_what_its_inputs_cost_the_others() -> None:
    information = torch.tensor([[6.0, 0.6], [0.0, 0.0]])
    # 0.3 of the columns' means, 3 and 0.3.
    assert torch.allclose(damped(information), torch.tensor([[6.9, 0.69], [0.9, 0.09]]))


def test_a_saturated_neuron_is_not_emptied() -> None:
    """GELU of a pre-activation of −9 has no slope, and without weights it is no longer at −9."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator) + 1
    weight = torch.randn(8, 16, generator=generator) / 4
    weight[0] = -9 / inputs.sum(dim=1).mean()
    weight.requires_grad_(True)
    bias = torch.zeros(8)
    bias[0] = 3
    information = torch.zeros_like(weight)
    for row in inputs:
        heard = torch.nn.functional.gelu(weight @ row + bias).sum()
        information += torch.autograd.grad(heard, weight)[0].square() / 64

    def lost(worth: Tensor) -> float:
        pruned = weight.detach() * Sparsity(0.25).mask_by_linear(worth)
        before, after = (torch.nn.functional.gelu(inputs @ one.T + bias) for one in (weight.detach(), pruned))
        return (after - before).square().mean().item()

    there = weight.detach()
    assert lost(saliency(there, damped(information))) < 0.3 * lost(saliency(there, information))


def test_each_linear_keeps_its_own_most_salient_weights(tiny_llama: Path, tmp_path: Path) -> None:
    original = loading.load(tiny_llama)
    information = fisher(original, context(tmp_path))
    made = OptimalBrainDamage(sparsity=0.7).compress(loading.load(tiny_llama), context(tmp_path))
    for name, layer in made.linears().items():
        weight = original.linears()[name].get_parameter("weight")
        worth = damped(information[name]).double() * weight.double() ** 2
        kept = layer.kept()
        assert worth[kept].min() >= worth[~kept].max() * (1 - 1e-5)
        assert torch.equal(layer.weight(), torch.where(kept, weight, 0))


def test_over_the_model_all_weights_are_compared_and_each_row_keeps_its_best(
    tiny_llama: Path, tmp_path: Path
) -> None:
    original = loading.load(tiny_llama)
    # A block that says nothing would lose everything.
    original.blocks[1].mlp.down_proj.weight.data.mul_(1e-4)
    information = fisher(original, context(tmp_path))
    linears = original.linears()
    weights = {name: layer.get_parameter("weight").detach().clone() for name, layer in linears.items()}
    worth = {}
    for name, weight in weights.items():
        worth[name] = saliency(weight.float(), damped(information[name]))
        rows = torch.arange(len(weight))
        worth[name][rows, worth[name].argmax(dim=1)] = torch.inf
    step = OptimalBrainDamage(sparsity=0.8, scope="model")
    outline = step.output_layout(original.layout())
    made = step.compress(original, context(tmp_path))
    together = highest(torch.cat([one.flatten() for one in worth.values()]), total(outline))
    for kept, (name, weight) in zip(
        together.split([weight.numel() for weight in weights.values()]), weights.items(), strict=True
    ):
        layer = made.linears()[name]
        assert torch.equal(layer.kept().flatten(), kept)
        assert layer.kept().any(dim=1).all()
        assert torch.equal(layer.weight(), torch.where(layer.kept(), weight, 0))
    shares = {
        layer.spec.kept / layer.spec.in_features / layer.spec.out_features
        for layer in made.linears().values()
    }
    assert max(shares) > 2 * min(shares)


def total(layout: loading.Layout) -> int:
    return sum(spec.kept or 0 for spec in layout.linears.values())


@pytest.mark.parametrize("share", [0.005, 0.01, 0.5, 0.95])
def test_over_the_model_the_outline_has_the_names_and_as_many_weights(
    share: float, tiny_llama: Path, tmp_path: Path
) -> None:
    step = OptimalBrainDamage(sparsity=share, scope="model")
    assert not step.exact
    assert OptimalBrainDamage(sparsity=share).exact
    model = loading.load(tiny_llama)
    expected = step.output_layout(model.layout())
    made = run._compressed(model, step, context(tmp_path)).layout()
    assert made.tensors().keys() == expected.tensors().keys()
    assert total(made) == total(expected)
    loading.save(model, tmp_path / "made", {})
    again = loading.load(tmp_path / "made")
    assert again.layout() == made
    with torch.no_grad():
        tokens = torch.arange(3, 19).unsqueeze(0)
        assert torch.equal(again.module(tokens).logits, model.module(tokens).logits)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_it_changes_the_predictions_less_than_magnitude(scope: str, tiny_llama: Path, tmp_path: Path) -> None:
    def original() -> Model:
        model = loading.load(tiny_llama)
        # Half of the inputs are weak and half of the neurons hardly heard, which no weight shows by itself.
        for block in model.blocks:
            block.input_layernorm.weight.data[::2] = 0.05
            block.post_attention_layernorm.weight.data[::2] = 0.05
            block.mlp.down_proj.weight.data[:, ::2] *= 0.05
        return model

    given = context(tmp_path, samples=128)
    assert given.calibration is not None
    before = predictions(original(), given.calibration)
    damaged = OptimalBrainDamage(sparsity=0.3, scope=scope).compress(original(), given)
    shrunk = techniques.load("magnitude").of({"sparsity": 0.3}).compress(original(), given)
    apart = [
        kl_div(predictions(made, given.calibration), before, reduction="sum", log_target=True).item()
        for made in (damaged, shrunk)
    ]
    assert apart[0] < 0.7 * apart[1]


@torch.no_grad()
def predictions(model: Model, rows: Tensor) -> Tensor:
    found: Tensor = model.module(rows).logits.double().log_softmax(dim=-1)
    return found
