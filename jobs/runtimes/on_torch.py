"""The runtime `torch`: eager PyTorch in bf16, on the CPU.

Packed and sparse linears are unpacked once, when the model is loaded: the file is small, but speed and memory are those
of a dense bf16 model of the same shapes. Only fewer and smaller matrices make this runtime faster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.models import loading
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear
from jobs.models.model import DTYPE, Model

LIBRARY = "torch"
FORMAT = "slimfront"
READS = ("slimfront", "safetensors")


def missing() -> str | None:
    return None


def load(folder: Path) -> Model:
    """Load a model with its packed and sparse linears unpacked to bf16.

    Linears that round their activations still do so.
    """
    return unpacked(loading.load(folder))


def unpacked(model: Model) -> Model:
    """Replace packed and sparse linears and tables of a model by dense ones, in place, and return it."""
    for name, layer in (*model.linears().items(), *model.tables().items()):
        if isinstance(layer, (PackedLinear, SparseLinear)):
            model.replace(name, layer.dense(DTYPE))
        elif isinstance(layer, PackedEmbedding):
            model.replace_embedding(layer.dense(DTYPE))
    return model


def start(folder: Path, threads: int) -> TorchRunner:
    """Load the model of this folder to run it. Sets the number of threads of the process."""
    torch.set_num_threads(threads)
    return TorchRunner(load(folder))


class TorchRunner:
    """A model in torch, and the KV cache of its current sequence."""

    def __init__(self, model: Model, device: str = "cpu") -> None:
        self._model = model
        self._module = cast(Any, model.module.to(device))
        self._device = device
        self._decodes = model.task == "causal-lm"
        self._cache_name = loading.cache_name(model.module)
        self._cache: Any = None

    @torch.inference_mode()
    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        return _array(self._model.answer(self._tokens(rows)))

    @torch.inference_mode()
    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        if not self._decodes:
            return self.answer(tokens)
        self._cache = None
        return self._step(tokens)

    @torch.inference_mode()
    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        if self._cache is None:
            raise ValueError("decode needs a prefill before it")
        return self._step(token)

    def _step(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        output = self._module(
            self._tokens(tokens), use_cache=True, logits_to_keep=1, **{self._cache_name: self._cache}
        )
        self._cache = output[self._cache_name]
        return _array(output.logits)

    def _tokens(self, rows: Int[np.ndarray, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        return torch.from_numpy(rows).to(self._device)


def _array(output: Tensor) -> Float[np.ndarray, "..."]:
    return output.float().cpu().numpy()
