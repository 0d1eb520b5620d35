"""Finetuning: the text becomes more likely, and corrections of low rank leave nothing but changed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.materials import TextSource
from jobs.models import families, loading
from jobs.models.layers import LowRankLinear
from jobs.models.model import DTYPE, Model
from jobs.techniques.finetune import Finetune
from jobs.training import lora

Tiny = Callable[..., Path]


@pytest.fixture
def context(tiny_llama: Path, text_file: Path) -> Context:
    return Context(
        statistics=cast(Statistics, None),
        workdir=tiny_llama,
        seed=0,
        training=data.windows_for(TextSource(str(text_file), 32, 32), tiny_llama),
    )


def loss(model: Model, context: Context) -> float:
    rows = cast(torch.Tensor, context.training)
    with torch.no_grad():
        logits = model.answer(rows)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_text_becomes_more_likely(method: str, tiny_llama: Path, context: Context) -> None:
    model = loading.load(tiny_llama)
    before, layout = loss(model, context), model.layout()
    Finetune(method=method, steps=30, batch=8, learning_rate=5e-3).compress(model, context)
    assert loss(model, context) < before - 0.2
    assert model.layout() == layout


def test_lora_changes_each_linear_by_a_matrix_of_its_rank_and_nothing_else(
    tiny_llama: Path, context: Context
) -> None:
    model, before = loading.load(tiny_llama), loading.load(tiny_llama).module.state_dict()
    Finetune(method="lora", rank=2, steps=5, learning_rate=1e-2).compress(model, context)
    linears = {f"{name}.weight" for name in model.linears()}
    for name, tensor in model.module.state_dict().items():
        change = tensor.float() - before[name].float()
        assert (name in linears) == bool(change.any()), name
        if name in linears:
            # What is above the rank is rounding to bf16.
            values = torch.linalg.svdvals(change)
            assert values[2] < 0.3 * values[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_corrections_compute_what_they_did_beside_the_weight(family: str, tiny: Tiny) -> None:
    model = loading.load(tiny(family))
    rows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untouched = model.answer(rows)
        lora.add(model, 4, seed=0)
        assert torch.equal(model.answer(rows), untouched)
        model.module.float()
        for layer in model.linears().values():
            nn.init.normal_(layer.get_parameter("u"), std=0.1, generator=torch.Generator().manual_seed(1))
        beside = model.answer(rows)
        lora.merge(model)
        torch.testing.assert_close(model.answer(rows), beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(beside, untouched.float(), atol=1e-2)
    assert not any(isinstance(layer, lora.LoraLinear) for layer in model.module.modules())


def test_thin_linears_get_corrections_too_and_ranks_above_theirs_are_refused(
    tiny_llama: Path, context: Context
) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    v, u = (nn.Linear(*shape, bias=False, dtype=DTYPE) for shape in ((64, 8), (8, 160)))
    model.replace(name, LowRankLinear(v, u).requires_grad_(False))
    before, layout = v.weight.clone(), model.layout()
    with pytest.raises(
        ValueError, match=rf"finetune\.rank=9 is outside \[1, 8\], the possible ranks of {name}\.v"
    ):
        Finetune(rank=9).output_layout(layout)
    Finetune(rank=8, steps=3, learning_rate=1e-2).compress(model, context)
    assert model.layout() == layout
    assert not torch.equal(model.module.get_parameter(f"{name}.v.weight"), before)


def test_models_without_a_next_token_are_refused_with_a_reason() -> None:
    bert, llama = families.family("bert"), families.family("llama")
    assert "distill" in str(Finetune.refusal(bert, "embedding"))
    assert "labels" in str(Finetune.refusal(llama, "classification"))
    assert Finetune.refusal(llama, "causal-lm") is None
