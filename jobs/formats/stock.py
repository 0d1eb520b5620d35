"""Describe an artifact by a plain config.json of its family, for programs that do not contain slimfront.

`refusal` reports the shapes that such a config cannot describe; `write_folder` writes config, weights and tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.models import loading, tokenizers
from jobs.models.layers import PackedLinear, SparseLinear
from jobs.models.layout import Layout, LinearSpec
from jobs.models.model import DTYPE

_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_SWITCHES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _QKVO, "mlp_bias": _GATED},
    "qwen3": {"attention_bias": _QKVO},
    "gemma3_text": {"attention_bias": _QKVO},
    "gpt_neox": {"attention_bias": ("attention.query_key_value", "attention.dense")},
    "opt": {
        "enable_bias": (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
            *("fc1", "fc2"),
        )
    },
}
"""For each family, the keys of its config that add biases, each to all of these linears of a block or to none."""

_BIASED: Mapping[str, tuple[str, ...]] = {
    "mistral": (),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj"),
    "gptj": ("mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
"""For each family, the linears of a block that always have a bias; in families without an entry here or in `_SWITCHES`
every linear has one."""

_ROWS = 4096
"""Rows of a table that are unpacked at a time: as 64-bit integers, a whole vocabulary would fill memory."""

_WITH_HEAD_WIDTH = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi")
"""Families whose config states the width of a head; in others it is the hidden width divided by the heads."""


def refusal(layout: Layout) -> str | None:
    """Return why no config.json of the family describes a model of this layout; None if one does."""
    return (
        _factored_refusal(layout)
        or _uneven_refusal(layout)
        or _heads_refusal(layout)
        or _bias_refusal(layout)
    )


def sparse_unpacked(layout: Layout) -> Layout:
    """Return the same layout with dense instead of sparse linears, and with every bias that the config requires.

    If a key of the config adds biases to several linears and only some have one, the others get zeros.
    """
    changed = {}
    for name, spec in layout.linears.items():
        block = layout.block_of(name)
        switched = [layout.linears[layout.name(block, path)] for path in _switched_with(layout, name)]
        bias = spec.bias or any(linear.bias for linear in switched)
        changed[name] = dataclasses.replace(spec, kept=None, bias=bias)
    return layout.with_linears(changed)


def mismatched_heads(layout: Layout) -> tuple[str, LinearSpec] | None:
    """Return the first block's linear that reads the heads if they are not together as wide as the model, else None."""
    out = layout.name(0, layout.family.attention.out)
    spec = layout.linears[out]
    if spec.in_features == spec.out_features:
        return None
    return out, spec


def stock_config(artifact: Path, layout: Layout) -> dict[str, Any]:
    """Return the config.json of an artifact with its real widths, heads and biases."""
    config: dict[str, Any] = json.loads((artifact / "config.json").read_text())
    first = {name: layout.linears[layout.name(0, name)] for name in _paths(layout)}
    for key, paths in _SWITCHES.get(layout.family.name, {}).items():
        config[key] = any(first[path].bias for path in paths)
    if layout.family.name in _WITH_HEAD_WIDTH:
        attention = layout.family.attention
        config["hidden_size"] = first[attention.out].out_features
        config["num_attention_heads"] = first[attention.query].out_features // layout.head_width
        config["num_key_value_heads"] = first[attention.key].out_features // layout.head_width
        config["head_dim"] = layout.head_width
    return config


def write_folder(
    artifact: Path,
    out: Path,
    weight_of: Callable[[str, LinearSpec, Mapping[str, Tensor]], dict[str, Tensor]],
    settings: Mapping[str, object],
) -> None:
    """Write weights, config and tokenizer of an artifact whose layout is not refused.

    weight_of: returns the tensors to write for the weight of a linear or table, by their names within it, from its
        full name, its spec and its tensors in the artifact.
    settings: further entries of the config.
    """
    layout = Layout.read(artifact)
    with_biases = sparse_unpacked(layout).linears
    tensors = load_file(artifact / loading.WEIGHTS)
    for name, spec in layout.matrices.items():
        stored = {part: tensors.pop(f"{name}.{part}") for part in spec.tensors()}
        written = weight_of(name, spec, stored)
        if "bias" in stored:
            written["bias"] = stored["bias"]
        elif name in with_biases and with_biases[name].bias:
            written["bias"] = torch.zeros(spec.out_features, dtype=DTYPE)
        tensors |= {f"{name}.{part}": tensor for part, tensor in written.items()}
    save_file(tensors, out / loading.WEIGHTS, metadata={"format": "pt"})
    config = {**stock_config(artifact, layout), **settings}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizers.copy_tokenizer(artifact, out)


def dense_weight(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
    """Return the bf16 weight of a linear or table of any form, unpacked as by the runtime `torch`."""
    if spec.packing is not None:
        starts = range(0, spec.out_features, _ROWS)
        return torch.cat([_unpacked(spec, tensors, slice(start, start + _ROWS)) for start in starts])
    if spec.kept is None:
        return tensors["weight"]
    sparse = SparseLinear(dataclasses.replace(spec, bias=False))
    sparse.mask, sparse.values = tensors["mask"], tensors["values"]
    return sparse.weight()


def _unpacked(spec: LinearSpec, tensors: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Return some rows of a packed weight."""
    rows_spec = dataclasses.replace(spec, out_features=len(tensors["packed"][rows]), bias=False)
    layer = PackedLinear(rows_spec, "meta")
    for part in rows_spec.tensors():
        tensor = tensors[part]
        if part != "input_scales":
            tensor = tensor[rows]
        setattr(layer, part, tensor)
    return layer.weight(DTYPE)


def _paths(layout: Layout) -> list[str]:
    """Return the paths of the first block's linears within it."""
    return [_path(layout, name) for name in layout.linears if layout.block_of(name) == 0]


def _path(layout: Layout, name: str) -> str:
    return name.removeprefix(layout.name(layout.block_of(name), ""))


def _switched_with(layout: Layout, name: str) -> tuple[str, ...]:
    """Return the paths of all linears that have a bias if this one has, by the same key of the config."""
    path = _path(layout, name)
    switches = _SWITCHES.get(layout.family.name, {}).values()
    return next((paths for paths in switches if path in paths), ())


def _factored_refusal(layout: Layout) -> str | None:
    for name in layout.linears:
        if name.endswith((".u", ".v")):
            whole, _, _ = name.rpartition(".")
            return f"factorizing left {whole} as thin linears, which no config of a {layout.family.name} describes"
    return None


def _uneven_refusal(layout: Layout) -> str | None:
    first = {path: layout.linears[layout.name(0, path)] for path in _paths(layout)}
    for name, spec in layout.linears.items():
        counterpart = first.get(_path(layout, name))
        if counterpart is None:
            return f"{name} has no counterpart in block 0"
        if _shape(spec) != _shape(counterpart):
            return (
                f"one config gives all blocks equal shapes, and {name} is {_shape(spec)} where that of "
                f"block 0 is {_shape(counterpart)}"
            )
    return None


def _shape(spec: LinearSpec) -> str:
    shape = f"{spec.out_features} by {spec.in_features}"
    if spec.bias:
        shape += " with a bias"
    return shape


def _heads_refusal(layout: Layout) -> str | None:
    if layout.family.name in _WITH_HEAD_WIDTH:
        return None
    narrower = mismatched_heads(layout)
    if narrower is None:
        return None
    out, spec = narrower
    return (
        f"the heads of a {layout.family.name} are together as wide as the model, and {out} reads heads of "
        f"{spec.in_features} in all and writes {spec.out_features}"
    )


def _bias_refusal(layout: Layout) -> str | None:
    """Refuse a bias that a step added where the family has none."""
    family = layout.family.name
    if layout.task == "classification" and not layout.family.encoder and "score.bias" in layout.others:
        return f"score has a bias, and the classifier of a {family} has none in any config"
    if family not in _BIASED and family not in _SWITCHES:
        return None
    always = _BIASED.get(family, ())
    for name, spec in layout.linears.items():
        if not spec.bias:
            continue
        if _path(layout, name) not in always and not _switched_with(layout, name):
            return f"{name} has a bias, and a {family} has none there in any config"
    return None
