"""Dropping blocks: the least influential blocks are removed, and the cache and the layout stay correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.layout import Packing
from jobs.techniques.drop_layers import DropLayers, keep_blocks


@pytest.fixture
def context(tmp_path: Path) -> Context:
    tokens = torch.randint(3, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    return Context(Statistics(None, ""), tmp_path, 0, calibration=tokens)


def test_a_block_without_influence_is_dropped_first(tiny_llama: Path, context: Context) -> None:
    model = loading.load(tiny_llama)
    idle = model.blocks[2]
    idle.self_attn.o_proj.weight.zero_()
    idle.mlp.down_proj.weight.zero_()
    remaining_blocks = [block for block in model.blocks if block is not idle]
    tokens = torch.randint(3, 512, (1, 8))
    original_logits = model.module(tokens).logits
    shortened = DropLayers(count=1).compress(model, context)
    assert list(shortened.blocks) == remaining_blocks
    assert torch.equal(shortened.module(tokens).logits, original_logits)


def test_the_cache_still_works_after_blocks_are_dropped(tiny_llama: Path, context: Context) -> None:
    model = loading.load(tiny_llama)
    keep_blocks(model, [1, 3])
    assert [block.self_attn.layer_idx for block in model.blocks] == [0, 1]
    assert model.config.num_hidden_layers == 2
    tokens = torch.randint(3, 512, (1, 8))
    uncached = model.module(tokens).logits[:, -1]
    cache_name = loading.cache_name(model.module)
    cache = model.module(tokens[:, :-1], use_cache=True)[cache_name]
    cached = model.module(tokens[:, -1:], **{cache_name: cache}).logits[:, -1]
    assert torch.allclose(uncached, cached, atol=0.02)


def test_blocks_of_packed_and_factored_models_can_be_dropped(tiny_llama: Path, context: Context) -> None:
    for name in ("svd_llm", "gptq"):
        fresh = Context(Statistics(None, ""), context.workdir, 0, calibration=context.calibration)
        model = techniques.load(name)().compress(loading.load(tiny_llama), fresh)
        expected = DropLayers(count=2).output_layout(model.layout())
        assert DropLayers(count=2).compress(model, context).layout() == expected


def test_blocks_of_unequal_shapes_are_refused_before_the_step_starts(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    name = layout.name(2, "mlp.up_proj")
    mixed = layout.with_linears({name: layout.packed(Packing(4, 32, True)).linears[name]})
    with pytest.raises(ValueError, match=r"block 2 .* has other shapes"):
        DropLayers(count=1).output_layout(mixed)


def test_dropping_all_blocks_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match=r"count=3 is outside \[0, 2\]"):
        DropLayers(count=3).output_layout(loading.original_layout(tiny_bert))
