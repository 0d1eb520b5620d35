from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs import families, gradients, models
from jobs.context import Context
from jobs.statistics import Statistics
from tests.conftest import Tiny


def text() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def context() -> Context:
    return Context(Statistics(None, "key"), Path(), 0, calibration=text())


def test_it_is_the_mean_squared_gradient_by_what_each_linear_gives(tiny_llama: Path) -> None:
    model = models.load(tiny_llama)
    found = gradients.sensitivities(model, context())
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


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in families.names() for task in families.family(name).tasks]
)
def test_every_linear_of_every_family_has_one_and_the_model_is_left_as_it_was(
    name: str, task: families.Task, tiny: Tiny
) -> None:
    model = models.load(tiny(name, task))
    found = gradients.sensitivities(model, context())
    assert found.keys() == model.linears().keys()
    assert all(value >= 0 for value in found.values())
    assert sum(value > 0 for value in found.values()) > 0.9 * len(found)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
