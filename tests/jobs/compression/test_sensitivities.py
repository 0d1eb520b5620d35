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


def text() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def context(repeats: int = 1) -> Context:
    """Repeated text has the same mean, and estimates of it have less noise."""
    return Context(Statistics(None, "key"), Path(), 0, calibration=text().repeat(repeats, 1))


def test_of_a_causal_model_it_is_the_mean_squared_gradient_by_what_each_linear_gives(
    tiny_llama: Path,
) -> None:
    model = loading.load(tiny_llama)
    found = importance.sensitivities(model, context())
    model.module.requires_grad_(True)
    expected = dict.fromkeys(model.linears(), 0.0)
    for row in text():
        given: dict[str, Tensor] = {}

        def keep(name: str, given: dict[str, Tensor] = given) -> object:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                output.retain_grad()
                given[name] = output

            return hook

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in model.linears().items()]
        logits = model.module(row.unsqueeze(0), use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits.float(), row[1:], reduction="sum").backward()
        for name, left in given.items():
            expected[name] += left.grad.float().square().mean().item() / (len(row) - 1) / len(text())
        for one in hooks:
            one.remove()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=0.05)


def test_of_an_encoder_it_is_the_whitened_square_of_each_sequences_gradient(tiny_bert: Path) -> None:
    model = loading.load(tiny_bert)

    def vector(row: Tensor) -> list[Tensor]:
        states = model.module(row.unsqueeze(0)).last_hidden_state.float()
        return list(nn.functional.normalize(states.mean(dim=1), dim=-1)[0])

    found = importance.sensitivities(model, context(repeats=20))
    expected = slowly(model, vector)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=0.3)


def slowly(model: Model, scalars: Callable[[Tensor], list[Tensor]]) -> dict[str, float]:
    """tr(D G⁻¹ Dᵀ) over its size, D being each scalar's gradient, summed over them: by autograd and an inverse."""
    linears = model.linears()
    weights = [layer.get_parameter("weight") for layer in linears.values()]
    grams = Statistics(None, "slow").grams(model, text(), lambda share, what: None)
    model.module.requires_grad_(True)
    total = dict.fromkeys(linears, 0.0)
    for row in text():
        for scalar in scalars(row):
            slopes = torch.autograd.grad(scalar, weights, retain_graph=True)
            for name, slope in zip(linears, slopes, strict=True):
                gram, slope = grams.gram(name).double(), slope.double()
                inverse = (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))).inverse()
                size = (inverse @ gram).trace() * len(slope)
                total[name] += ((slope @ inverse @ slope.T).trace() / size / len(text())).item()
    model.module.requires_grad_(False)
    return total


def test_errors_that_a_sequences_tokens_share_add_up_in_a_sentence_vector(tiny_bert: Path) -> None:
    """Foretold, for errors of the last block's values that are random in the inputs' whitened coordinates."""
    model = loading.load(tiny_bert)
    model.module.float()
    name = "encoder.layer.1.attention.self.value"
    given = context(repeats=20)
    found = importance.sensitivities(model, given)[name].item()
    gram = given.statistics.grams(model, text(), given.report).gram(name)
    root = torch.linalg.cholesky(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
    weight = model.linears()[name].get_parameter("weight").data
    kept, generator = weight.clone(), torch.Generator().manual_seed(1)

    def vectors() -> Tensor:
        with torch.no_grad():
            return model.module(text()).last_hidden_state.mean(dim=1).double()

    before, lost, foretold = vectors(), 0.0, 0.0
    for _ in range(40):
        error = torch.linalg.solve_triangular(
            root, 1e-2 * torch.randn(kept.shape, generator=generator), upper=False, left=False
        )
        weight.copy_(kept + error)
        lost += (1 - nn.functional.cosine_similarity(vectors(), before)).mean().item()
        foretold += 0.5 * found * ((error @ gram) * error).sum().item()
    assert lost == pytest.approx(foretold, rel=0.2)


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in families.names() for task in families.family(name).tasks]
)
def test_every_linear_of_every_family_has_one_and_the_model_is_left_as_it_was(
    name: str, task: families.Task, tiny: Tiny
) -> None:
    model = loading.load(tiny(name, task))
    found = importance.sensitivities(model, context())
    assert found.keys() == model.linears().keys()
    assert all(value >= 0 for value in found.values())
    assert sum(value > 0 for value in found.values()) > 0.9 * len(found)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
