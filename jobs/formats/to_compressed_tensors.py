"""The format `compressed-tensors`: packed integers as vLLM and transformers read them (`pack-quantized`).

github.com/vllm-project/compressed-tensors. Integers, scales and zero points go over as they are: value k of a row
stands at bit k · bits of it, little end first, in words of 32 bits; zero points the same way down each column; both
offset by 2**(bits-1), which makes our unsigned integers of their signed ones. Scales are fp16, and so the config's
dtype is float16, that no loader rounds them. Written from this description: the library itself is not needed.

Token embedding and head are written in bf16, unpacked where they were packed, and sparse linears dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jobs.formats import stock
from jobs.models.bit_packing import pack
from jobs.models.layout import Layout, LinearSpec, Packing, TensorSpec, safetensors_bytes

WEIGHTS = "*.safetensors"

_BITS = (4, 8)
"""That the kernels of vLLM know."""
_OVERFLOWING = ("gemma3_text",)
"""Families whose activations are too large for fp16: theirs stay bf16, to which a loader rounds the scales."""


def missing() -> str | None:
    return None


def refusal(layout: Layout) -> str | None:
    packed = {name: spec for name, spec in layout.linears.items() if spec.packing is not None}
    if not packed:
        return "no linear of its blocks is quantized"
    if layout.family.name == "gpt2":
        return "quantizing made linears of a gpt2's Conv1D, which compressed-tensors does not know"
    for name, spec in packed.items():
        reason = _cannot(spec)
        if reason is not None:
            return f"quantizing left {name} {reason}"
    return stock.refusal(layout)


def size_bytes(layout: Layout, original: Path) -> int:
    dense = stock.sparse_unpacked(layout)
    tensors = dict(layout.others)
    for name, spec in (*dense.linears.items(), *layout.tables.items()):
        if spec.packing is None or name in layout.tables:
            tensors[f"{name}.weight"] = TensorSpec("BF16", (spec.out_features, spec.in_features))
        else:
            tensors |= {f"{name}.{part}": tensor for part, tensor in _tensors(spec, spec.packing).items()}
        if spec.bias:
            tensors[f"{name}.bias"] = TensorSpec("BF16", (spec.out_features,))
    return safetensors_bytes(tensors)


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    layout = Layout.read(artifact)

    def weight_of(name: str, spec: LinearSpec, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if spec.packing is None or name in layout.tables:
            return {"weight": stock.dense_weight(spec, held)}
        return _packed(spec, spec.packing, held)

    dtype = "bfloat16" if layout.family.name in _OVERFLOWING else "float16"
    stock.write_folder(
        artifact, out, weight_of, {"dtype": dtype, "quantization_config": quantization_config(layout)}
    )


def quantization_config(layout: Layout) -> dict[str, Any]:
    """What config.json says of the quantized linears: one group of them per packing, by their full names."""
    groups: dict[Packing, list[str]] = {}
    dense = list(layout.tables)[1:]
    for name, spec in layout.linears.items():
        if spec.packing is None:
            dense.append(name)
        else:
            groups.setdefault(spec.packing, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": names, "weights": _weights(packing)}
            for number, (packing, names) in enumerate(groups.items())
        },
        "ignore": dense,
    }


def _weights(packing: Packing) -> dict[str, Any]:
    return {
        "num_bits": packing.bits,
        "type": "int",
        "symmetric": packing.symmetric,
        "strategy": "group" if packing.group else "channel",
        "group_size": packing.group or None,
        "actorder": None,
        "dynamic": False,
    }


def _cannot(spec: LinearSpec) -> str | None:
    """What of a packed linear has no place in the format."""
    packing = spec.packing
    assert packing is not None
    if packing.bits not in _BITS:
        return f"{packing.bits}-bit integers, and vLLM has kernels for 4 and 8 bits"
    if packing.real_zeros:
        return "zero points that are not whole"
    if packing.activation_bits != 16:
        return f"rounding its activations to {packing.activation_bits} bits, after scales of their own"
    if packing.input_scales:
        return "a scale per input, which cannot be moved into other weights without rounding these again"
    if packing.group and spec.in_features % packing.group:
        return (
            f"groups of {packing.group}, which do not divide its {spec.in_features} inputs; choose another group, "
            f"or 0"
        )
    return None


def _words(values: int, bits: int) -> int:
    """How many words of 32 bits hold so many values in a row."""
    return math.ceil(values * bits / 32)


def _tensors(spec: LinearSpec, packing: Packing) -> dict[str, TensorSpec]:
    groups = packing.groups(spec.in_features)
    found = {
        "weight_packed": TensorSpec("I32", (spec.out_features, _words(spec.in_features, packing.bits))),
        "weight_scale": TensorSpec("F16", (spec.out_features, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if not packing.symmetric:
        found["weight_zero_point"] = TensorSpec("I32", (_words(spec.out_features, packing.bits), groups))
    return found


def _packed(spec: LinearSpec, packing: Packing, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `_tensors`. Our bytes are their words already, but for what pads the end of a row."""
    found = {
        "weight_packed": _as_words(held["packed"], _words(spec.in_features, packing.bits)),
        "weight_scale": held["scales"],
        "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
    }
    if not packing.symmetric:
        columns = pack(held["zeros"].T, packing.bits)
        words = _as_words(columns, _words(spec.out_features, packing.bits))
        found["weight_zero_point"] = words.T.contiguous()
    return found


def _as_words(rows: Int[Tensor, "rows bytes"], words: int) -> Int[Tensor, "rows words"]:
    return rows[:, : words * 4].contiguous().view(torch.int32)
