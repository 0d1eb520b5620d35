"""Stock: what a plain config.json of the family can say of a model's shapes, which code that is not ours reads."""

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
"""Per family, the config's keys that give biases to some linears, all of them or none."""

_BIASED: Mapping[str, tuple[str, ...]] = {
    "mistral": (),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj"),
    "gptj": ("mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
"""Per family, the linears that always have a bias, besides those of a switch; in families not named in either
table every linear has one."""

_ROWS = 4096
"""Rows of a table that are unpacked at once: a vocabulary of them, as 64-bit integers, would fill memory."""

_WITH_HEAD_WIDTH = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi")
"""Families whose config holds the width of a head by itself; elsewhere it is the hidden width over the heads."""


def refusal(layout: Layout) -> str | None:
    """Why no config.json of the family describes a model of these shapes; None if one does."""
    return _factored(layout) or _uneven(layout) or _heads(layout) or _biases(layout)


def sparse_unpacked(layout: Layout) -> Layout:
    """The same layout with sparse linears dense, and with every bias that the family's config asks for: where it
    gives biases to several linears at once and some have none, these get zeros."""
    changed = {}
    for name, spec in layout.linears.items():
        bias = spec.bias or any(
            layout.linears[layout.name(layout.block_of(name), other)].bias
            for other in _switched_with(layout, name)
        )
        changed[name] = dataclasses.replace(spec, kept=None, bias=bias)
    return layout.with_linears(changed)


def mismatched_heads(layout: Layout) -> tuple[str, LinearSpec] | None:
    """The first linear that reads the heads, where these together are not as wide as the model; None where they are."""
    out = layout.name(0, layout.family.attention.out)
    spec = layout.linears[out]
    return None if spec.in_features == spec.out_features else (out, spec)


def stock_config(artifact: Path, layout: Layout) -> dict[str, Any]:
    """The config.json of an artifact, told of its widths, heads and biases."""
    found: dict[str, Any] = json.loads((artifact / "config.json").read_text())
    first = {name: layout.linears[layout.name(0, name)] for name in _paths(layout)}
    for key, paths in _SWITCHES.get(layout.family.name, {}).items():
        found[key] = any(first[path].bias for path in paths)
    if layout.family.name in _WITH_HEAD_WIDTH:
        attention = layout.family.attention
        found["hidden_size"] = first[attention.out].out_features
        found["num_attention_heads"] = first[attention.query].out_features // layout.head_width
        found["num_key_value_heads"] = first[attention.key].out_features // layout.head_width
        found["head_dim"] = layout.head_width
    return found


def write_folder(
    artifact: Path,
    out: Path,
    weight_of: Callable[[str, LinearSpec, Mapping[str, Tensor]], dict[str, Tensor]],
    settings: Mapping[str, object],
) -> None:
    """Write weights, config and tokenizer of an artifact whose shapes a stock config can say.

    weight_of: the tensors that hold the weight of a linear or table, by their names within it, from its full name,
        its spec in the artifact, and what the artifact holds of it. settings: what the config says besides.
    """
    layout = Layout.read(artifact)
    with_biases = sparse_unpacked(layout).linears
    tensors = load_file(artifact / loading.WEIGHTS)
    for name, spec in layout.matrices.items():
        held = {part: tensors.pop(f"{name}.{part}") for part in spec.tensors()}
        made = weight_of(name, spec, held)
        if "bias" in held:
            made["bias"] = held["bias"]
        elif name in with_biases and with_biases[name].bias:
            made["bias"] = torch.zeros(spec.out_features, dtype=DTYPE)
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    save_file(tensors, out / loading.WEIGHTS, metadata={"format": "pt"})
    told = {**stock_config(artifact, layout), **settings}
    (out / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    tokenizers.copy_tokenizer(artifact, out)


def dense_weight(spec: LinearSpec, held: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
    """The bf16 weight of a linear or table of any form, as the runtime `torch` unpacks it."""
    if spec.packing is not None:
        rows = [_unpacked(spec, held, slice(at, at + _ROWS)) for at in range(0, spec.out_features, _ROWS)]
        return torch.cat(rows)
    if spec.kept is None:
        return held["weight"]
    sparse = SparseLinear(dataclasses.replace(spec, bias=False))
    sparse.mask, sparse.values = held["mask"], held["values"]
    return sparse.weight()


def _unpacked(spec: LinearSpec, held: Mapping[str, Tensor], rows: slice) -> Tensor:
    some = dataclasses.replace(spec, out_features=len(held["packed"][rows]), bias=False)
    layer = PackedLinear(some, "meta")
    for part in some.tensors():
        tensor = held[part]
        setattr(layer, part, tensor if part == "input_scales" else tensor[rows])
    return layer.weight(DTYPE)


def _paths(layout: Layout) -> list[str]:
    """Where the linears of a block lie within it."""
    return [_path(layout, name) for name in layout.linears if layout.block_of(name) == 0]


def _path(layout: Layout, name: str) -> str:
    return name.removeprefix(layout.name(layout.block_of(name), ""))


def _switched_with(layout: Layout, name: str) -> tuple[str, ...]:
    path = _path(layout, name)
    every = _SWITCHES.get(layout.family.name, {}).values()
    return next((paths for paths in every if path in paths), ())


def _factored(layout: Layout) -> str | None:
    for name in layout.linears:
        if name.endswith((".u", ".v")):
            whole, _, _ = name.rpartition(".")
            return (
                f"factorizing left {whole} as thin linears, which no config of a {layout.family.name} knows"
            )
    return None


def _uneven(layout: Layout) -> str | None:
    first = {path: layout.linears[layout.name(0, path)] for path in _paths(layout)}
    for name, spec in layout.linears.items():
        other = first.get(_path(layout, name))
        if other is None:
            return f"{name} has no like in block 0"
        shape, even = (spec.out_features, spec.in_features), (other.out_features, other.in_features)
        if shape != even or spec.bias != other.bias:
            told = [f"{out} by {into}" for out, into in (shape, even)]
            biases = [" with a bias" if one.bias else "" for one in (spec, other)]
            return (
                f"one config gives all blocks equal shapes, and {name} is {told[0]}{biases[0]} where that of "
                f"block 0 is {told[1]}{biases[1]}"
            )
    return None


def _heads(layout: Layout) -> str | None:
    if layout.family.name in _WITH_HEAD_WIDTH:
        return None
    narrower = mismatched_heads(layout)
    if narrower is None:
        return None
    out, spec = narrower
    return (
        f"a {layout.family.name}'s heads divide its width among them, and {out} reads heads of "
        f"{spec.in_features} in all and writes {spec.out_features}"
    )


def _biases(layout: Layout) -> str | None:
    """Biases that a step added where the family has none."""
    family = layout.family.name
    if layout.task == "classification" and not layout.family.encoder and "score.bias" in layout.others:
        return f"score has a bias, and no config gives the classifier of a {family} one"
    always = _BIASED.get(family, () if family in _SWITCHES else None)
    for name, spec in layout.linears.items():
        if not spec.bias or always is None:
            continue
        if _path(layout, name) not in always and not _switched_with(layout, name):
            return f"{name} has a bias, and no config gives a {family} one there"
    return None
