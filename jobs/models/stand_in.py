"""Models of a given shape with arbitrary weights, to time operations on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from jobs.models.bit_packing import pack
from jobs.models.families import family
from jobs.models.layers import PackedEmbedding
from jobs.models.layout import Layout
from jobs.models.loading import empty_module, save, tie_weights
from jobs.models.model import DTYPE_NAMES, Model, fit_heads, reshape


def empty(folder: Path, layout: Layout) -> Model:
    """The model of an artifact's folder as `layout`, a variant of its own, with tensors whose values mean nothing."""
    config = transformers.AutoConfig.from_pretrained(folder)
    module = empty_module(config, "cpu")
    model = Model(module, family(config.model_type), folder)
    reshape(model, layout)
    for name, tensor in layout.tensors().items():
        part, _, child = name.rpartition(".")
        held = getattr(module.get_submodule(part), child)
        if held.device.type == "meta":
            values = nn.Parameter(torch.empty(tensor.shape, dtype=held.dtype), requires_grad=False)
            setattr(module.get_submodule(part), child, values)
    tie_weights(module)
    fit_heads(model)
    module.requires_grad_(False)
    return Model(module.eval(), model.family, folder)


def save_stand_in(layout: Layout, original: Path, folder: Path) -> None:
    """Write a model of this layout, which was outlined from `original`'s, with weights that mean nothing: it is as
    fast and as big as any other of its shapes."""
    config: Any = transformers.AutoConfig.from_pretrained(original)
    for kinds in ("layer_types", "attention_layers"):  # of each block, where they differ
        if getattr(config, kinds, None):
            setattr(config, kinds, getattr(config, kinds)[: layout.depth])
    if getattr(config, "attention_layers", None):  # GPT-Neo's, written twice
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = layout.depth
    if len(layout.tables) > 1:
        config.tie_word_embeddings = False
    module = empty_module(config, "cpu")
    model = Model(module, family(config.model_type), original)
    reshape(model, layout)
    module.load_state_dict(_arbitrary(layout), strict=False, assign=True)
    if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
        tie_weights(module)
    fit_heads(model)
    save(model, folder, {"text": "a stand-in of arbitrary weights"})


def _arbitrary(layout: Layout) -> dict[str, Tensor]:
    """Finite weights of usual magnitudes, the same at every call: numbers far too small would be slow."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in layout.tensors().items():
        dtype = dtypes[tensor.dtype]
        if dtype == torch.uint8:
            found[name] = torch.randint(256, tensor.shape, generator=generator, dtype=dtype)
        elif not dtype.is_floating_point:
            found[name] = torch.zeros(tensor.shape, dtype=dtype)
        elif len(tensor.shape) > 1 and not name.endswith((".scales", ".zeros")):
            found[name] = torch.empty(tensor.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        else:
            found[name] = torch.full(tensor.shape, 0.01 if name.endswith(".scales") else 1.0, dtype=dtype)
    for name, spec in layout.matrices.items():
        if spec.packing is not None and f"{name}.zeros" in found:
            found[f"{name}.zeros"].fill_(2 ** (spec.packing.bits - 1))
        if spec.kept is not None:
            places = torch.arange(spec.out_features * spec.in_features) < spec.kept
            found[f"{name}.mask"] = pack(places.view(spec.out_features, spec.in_features), 1)
    return found
