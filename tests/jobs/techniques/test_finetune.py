"""Finetuning makes the text more likely, and low-rank corrections leave only changed weights behind."""

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


def mean_loss(model: Model, context: Context) -> float:
    rows = cast(torch.Tensor, context.training)
    with torch.no_grad():
        logits = model.answer(rows)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning_lowers_the_loss_on_the_text(method: str, tiny_llama: Path, context: Context) -> None:
    model = loading.load(tiny_llama)
    initial_loss, layout = mean_loss(model, context), model.layout()
    Finetune(method=method, steps=30, batch=8, learning_rate=5e-3).compress(model, context)
    assert mean_loss(model, context) < initial_loss - 0.2
    assert model.layout() == layout


def test_lora_changes_only_linears_each_by_a_matrix_of_the_rank(tiny_llama: Path, context: Context) -> None:
    model, initial_state = loading.load(tiny_llama), loading.load(tiny_llama).module.state_dict()
    Finetune(method="lora", rank=2, steps=5, learning_rate=1e-2).compress(model, context)
    linears = {f"{name}.weight" for name in model.linears()}
    for name, tensor in model.module.state_dict().items():
        change = tensor.float() - initial_state[name].float()
        assert (name in linears) == bool(change.any()), name
        if name in linears:
            # Singular values above the rank come from rounding to bf16.
            values = torch.linalg.svdvals(change)
            assert values[2] < 0.3 * values[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_corrections_compute_the_same_as_separate_ones(family: str, tiny: Tiny) -> None:
    model = loading.load(tiny(family))
    rows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original_outputs = model.answer(rows)
        lora.add(model, 4, seed=0)
        assert torch.equal(model.answer(rows), original_outputs)
        model.module.float()
        for layer in model.linears().values():
            nn.init.normal_(layer.get_parameter("u"), std=0.1, generator=torch.Generator().manual_seed(1))
        separate_outputs = model.answer(rows)
        lora.merge(model)
        torch.testing.assert_close(model.answer(rows), separate_outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(separate_outputs, original_outputs.float(), atol=1e-2)
    assert not any(isinstance(layer, lora.LoraLinear) for layer in model.module.modules())


def test_factors_get_corrections_and_higher_ranks_are_refused(tiny_llama: Path, context: Context) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    v, u = (nn.Linear(*shape, bias=False, dtype=DTYPE) for shape in ((64, 8), (8, 160)))
    model.replace(name, LowRankLinear(v, u).requires_grad_(False))
    initial_weight, layout = v.weight.clone(), model.layout()
    with pytest.raises(
        ValueError, match=rf"finetune\.rank=9 is outside \[1, 8\], the possible ranks of {name}\.v"
    ):
        Finetune(rank=9).output_layout(layout)
    Finetune(rank=8, steps=3, learning_rate=1e-2).compress(model, context)
    assert model.layout() == layout
    assert not torch.equal(model.module.get_parameter(f"{name}.v.weight"), initial_weight)


def test_models_that_do_not_predict_tokens_are_refused_with_a_reason() -> None:
    bert, llama = families.family("bert"), families.family("llama")
    assert "distill" in str(Finetune.refusal(bert, "embedding"))
    assert "labels" in str(Finetune.refusal(llama, "classification"))
    assert Finetune.refusal(llama, "causal-lm") is None
