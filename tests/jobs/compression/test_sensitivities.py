"""Sensitivities of linears equal slow reference computations and predict the loss of agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.compression import importance
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.model import Model
from tests.conftest import Tiny


def make_tokens() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def context(repeats: int = 1) -> Context:
    """Return a context; repeated text has the same mean, with less noisy estimates."""
    return Context(Statistics(None, "key"), Path(), 0, calibration=make_tokens().repeat(repeats, 1))


def test_for_a_causal_model_sensitivity_is_the_mean_squared_gradient_of_outputs(
    tiny_llama: Path,
) -> None:
    model = loading.load(tiny_llama)
    sensitivities = importance.sensitivities(model, context())
    model.module.requires_grad_(True)
    expected = dict.fromkeys(model.linears(), 0.0)
    for row in make_tokens():
        outputs: dict[str, Tensor] = {}

        def make_hook(name: str, outputs: dict[str, Tensor] = outputs) -> object:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                output.retain_grad()
                outputs[name] = output

            return hook

        hooks = [layer.register_forward_hook(make_hook(name)) for name, layer in model.linears().items()]
        logits = model.module(row.unsqueeze(0), use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits.float(), row[1:], reduction="sum").backward()
        for name, linear_output in outputs.items():
            expected[name] += (
                linear_output.grad.float().square().mean().item() / (len(row) - 1) / len(make_tokens())
            )
        for handle in hooks:
            handle.remove()
    assert {name: value.item() for name, value in sensitivities.items()} == pytest.approx(expected, rel=0.05)


def test_for_an_encoder_sensitivity_is_the_whitened_squared_gradient(tiny_bert: Path) -> None:
    model = loading.load(tiny_bert)

    def vector(row: Tensor) -> list[Tensor]:
        states = model.module(row.unsqueeze(0)).last_hidden_state.float()
        return list(nn.functional.normalize(states.mean(dim=1), dim=-1)[0])

    sensitivities = importance.sensitivities(model, context(repeats=20))
    expected = compute_slowly(model, vector)
    assert {name: value.item() for name, value in sensitivities.items()} == pytest.approx(expected, rel=0.3)


def compute_slowly(model: Model, scalars: Callable[[Tensor], list[Tensor]]) -> dict[str, float]:
    """Return the sum over scalars of tr(D G⁻¹ Dᵀ) over its size, where D is the gradient, with an explicit inverse."""
    linears = model.linears()
    weights = [layer.get_parameter("weight") for layer in linears.values()]
    grams = Statistics(None, "slow").grams(model, make_tokens(), lambda share, activity: None)
    model.module.requires_grad_(True)
    total = dict.fromkeys(linears, 0.0)
    for row in make_tokens():
        for scalar in scalars(row):
            slopes = torch.autograd.grad(scalar, weights, retain_graph=True)
            for name, slope in zip(linears, slopes, strict=True):
                gram, slope = grams.gram(name).double(), slope.double()
                inverse = (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))).inverse()
                size = (inverse @ gram).trace() * len(slope)
                total[name] += ((slope @ inverse @ slope.T).trace() / size / len(make_tokens())).item()
    model.module.requires_grad_(False)
    return total


def test_sensitivity_predicts_the_effect_of_errors_on_a_sentence_vector(tiny_bert: Path) -> None:
    """The errors are random in the whitened input coordinates of the values in the last block."""
    model = loading.load(tiny_bert)
    model.module.float()
    name = "encoder.layer.1.attention.self.value"
    repeated_context = context(repeats=20)
    sensitivity = importance.sensitivities(model, repeated_context)[name].item()
    gram = repeated_context.statistics.grams(model, make_tokens(), repeated_context.report).gram(name)
    root = torch.linalg.cholesky(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
    weight = model.linears()[name].get_parameter("weight").data
    original_weight, generator = weight.clone(), torch.Generator().manual_seed(1)

    def vectors() -> Tensor:
        with torch.no_grad():
            return model.module(make_tokens()).last_hidden_state.mean(dim=1).double()

    original_vectors, actual_loss, predicted_loss = vectors(), 0.0, 0.0
    for _ in range(40):
        error = torch.linalg.solve_triangular(
            root, 1e-2 * torch.randn(original_weight.shape, generator=generator), upper=False, left=False
        )
        weight.copy_(original_weight + error)
        actual_loss += (1 - nn.functional.cosine_similarity(vectors(), original_vectors)).mean().item()
        predicted_loss += 0.5 * sensitivity * ((error @ gram) * error).sum().item()
    assert actual_loss == pytest.approx(predicted_loss, rel=0.2)


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in families.names() for task in families.family(name).tasks]
)
def test_every_linear_of_every_family_has_a_sensitivity_and_the_model_is_unchanged(
    name: str, task: families.Task, tiny: Tiny
) -> None:
    model = loading.load(tiny(name, task))
    sensitivities = importance.sensitivities(model, context())
    assert sensitivities.keys() == model.linears().keys()
    assert all(value >= 0 for value in sensitivities.values())
    assert sum(value > 0 for value in sensitivities.values()) > 0.9 * len(sensitivities)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
