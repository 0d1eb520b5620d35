"""Models of any layout with arbitrary weights, to trace graphs of them or to time them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from jobs.models.bit_packing import pack
from jobs.models.families import family
from jobs.models.layers import PackedEmbedding
from jobs.models.layout import Layout
from jobs.models.loading import empty_module, load_config, save, tie_weights
from jobs.models.model import DTYPE_NAMES, Model, fit_heads, reshape


def uninitialized_model(folder: Path, layout: Layout) -> Model:
    """Return an artifact's model in another layout of the same parts, with uninitialized tensors."""
    config = load_config(folder)
    module = empty_module(config, "cpu")
    model = Model(module, family(config.model_type), folder)
    reshape(model, layout)
    for name, tensor in layout.tensors().items():
        part, _, child = name.rpartition(".")
        placeholder = getattr(module.get_submodule(part), child)
        if placeholder.device.type == "meta":
            values = nn.Parameter(torch.empty(tensor.shape, dtype=placeholder.dtype), requires_grad=False)
            setattr(module.get_submodule(part), child, values)
    tie_weights(module)
    fit_heads(model)
    module.requires_grad_(False)
    return Model(module.eval(), model.family, folder)


def save_stand_in(layout: Layout, original: Path, folder: Path) -> None:
    """Write an artifact with arbitrary weights, as fast and as large as every model of this layout.

    layout: derived from the layout of `original` by techniques.
    """
    config: Any = load_config(original)
    for key in ("layer_types", "attention_layers"):  # lists of one entry per block
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key)[: layout.depth])
    if getattr(config, "attention_layers", None):  # GPT-Neo's config states them twice
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = layout.depth
    if len(layout.tables) > 1:
        config.tie_word_embeddings = False
    module = empty_module(config, "cpu")
    model = Model(module, family(config.model_type), original)
    reshape(model, layout)
    module.load_state_dict(_arbitrary_weights(layout), strict=False, assign=True)
    if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
        tie_weights(module)
    fit_heads(model)
    save(model, folder, {"text": "a stand-in of arbitrary weights"})


def _arbitrary_weights(layout: Layout) -> dict[str, Tensor]:
    """Return finite weights of usual magnitudes, the same at every call: subnormal numbers would be slow."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    weights: dict[str, Tensor] = {}
    for name, tensor in layout.tensors().items():
        dtype = dtypes[tensor.dtype]
        if dtype == torch.uint8:
            weights[name] = torch.randint(256, tensor.shape, generator=generator, dtype=dtype)
        elif not dtype.is_floating_point:
            weights[name] = torch.zeros(tensor.shape, dtype=dtype)
        elif len(tensor.shape) > 1 and not name.endswith((".scales", ".zeros")):
            weights[name] = torch.empty(tensor.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        else:
            weights[name] = torch.full(tensor.shape, 0.01 if name.endswith(".scales") else 1.0, dtype=dtype)
    for name, spec in layout.matrices.items():
        if spec.packing is not None and f"{name}.zeros" in weights:
            weights[f"{name}.zeros"].fill_(2 ** (spec.packing.bits - 1))
        if spec.kept is not None:
            stored = torch.arange(spec.out_features * spec.in_features) < spec.kept
            weights[f"{name}.mask"] = pack(stored.view(spec.out_features, spec.in_features), 1)
    return weights
