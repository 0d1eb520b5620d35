"""Runtimes compute the outputs of the files, with packed linears unpacked, at once and token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from jobs import runtimes
from jobs.models import loading
from jobs.models.layers import PackedLinear
from jobs.models.layout import Packing
from jobs.models.model import DTYPE
from jobs.runtimes import on_torch


def packed_copy(original: Path, folder: Path) -> Path:
    """Write a copy of a model with one linear quantized to packed 8-bit integers."""
    model = loading.load(original)
    name = "model.layers.0.mlp.up_proj"
    weight = model.module.get_submodule(name).weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    integers = (weight / scales).round().clamp(-128, 127).long() + 128
    model.replace(name, PackedLinear.of(integers, scales, None, Packing(8, 0, True), None))
    loading.save(model, folder, {})
    return folder


def test_the_torch_runtime_unpacks_packed_linears_when_it_loads(tiny_llama: Path, tmp_path: Path) -> None:
    folder = packed_copy(tiny_llama, tmp_path / "packed")
    packed = loading.load(folder).module.get_submodule("model.layers.0.mlp.up_proj")
    run = on_torch.load(folder).module.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(packed, PackedLinear)
    assert isinstance(run, nn.Linear)
    assert torch.equal(run.weight, packed.weight().to(DTYPE))


def test_decoding_token_by_token_gives_the_outputs_of_the_whole_text(tiny_llama: Path) -> None:
    tokens = np.random.default_rng(0).integers(512, size=(1, 12))
    runner = runtimes.load("torch").start(tiny_llama, 1)
    steps = [runner.prefill(tokens[:, :8])]
    steps += [runner.decode(tokens[:, i : i + 1]) for i in range(8, 12)]
    expected = loading.load(tiny_llama).module(torch.from_numpy(tokens)).logits[:, 7:].float()
    torch.testing.assert_close(torch.from_numpy(np.concatenate(steps, 1)), expected, rtol=0.05, atol=0.02)


def test_a_prefill_starts_a_new_sequence(tiny_llama: Path) -> None:
    tokens = np.arange(8)[None]
    runner = runtimes.load("torch").start(tiny_llama, 1)
    fresh = runner.prefill(tokens)
    runner.decode(tokens[:, :1])
    assert np.array_equal(runner.prefill(tokens), fresh)


def test_an_encoder_runs_whole_texts_only(tiny_bert: Path) -> None:
    runner = runtimes.load("torch").start(tiny_bert, 1)
    assert runner.prefill(np.arange(8)[None]).shape == (1, 8, 64)
    with pytest.raises(ValueError, match="prefill"):
        runner.decode(np.zeros((1, 1), np.int64))


def test_an_unknown_runtime_is_refused_with_the_nearest_known_one() -> None:
    assert "torch" in runtimes.names()
    with pytest.raises(LookupError, match="did you mean torch"):
        runtimes.load("torhc")
