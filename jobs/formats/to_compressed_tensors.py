"""The format `compressed-tensors`: packed integers as vLLM and transformers read them (`pack-quantized`).

github.com/vllm-project/compressed-tensors. Integers, scales and zero points are stored unchanged: integer k of a row
starts at bit k · bits, little-endian, in words of 32 bits; zero points are packed in the same way down each column.
Both are offset by 2**(bits-1), so our unsigned integers are the format's signed ones. Scales are fp16, and the
config's dtype is float16, so that no loader rounds them. The library itself is not needed to write the format.

Token embedding and head are written in bf16, unpacked if they were packed, and sparse linears dense.
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
"""Bits that vLLM has kernels for."""
_BF16_FAMILIES = ("gemma3_text",)
"""Families whose activations overflow in fp16: their dtype stays bfloat16, and a loader rounds the scales to it."""


def missing() -> str | None:
    return None


def refusal(layout: Layout) -> str | None:
    packed = {name: spec for name, spec in layout.linears.items() if spec.packing is not None}
    if not packed:
        return "no linear of its blocks is quantized"
    if layout.family.name == "gpt2":
        return "quantizing made linears of a gpt2's Conv1D, which compressed-tensors does not support"
    for name, spec in packed.items():
        reason = _packing_refusal(spec)
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

    def weight_of(name: str, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if spec.packing is None or name in layout.tables:
            return {"weight": stock.dense_weight(spec, tensors)}
        return _packed(spec, spec.packing, tensors)

    dtype = "float16"
    if layout.family.name in _BF16_FAMILIES:
        dtype = "bfloat16"
    settings = {"dtype": dtype, "quantization_config": quantization_config(layout)}
    stock.write_folder(artifact, out, weight_of, settings)


def quantization_config(layout: Layout) -> dict[str, Any]:
    """Return config.json's description of the quantized linears: one group per packing, with their full names."""
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


def _packing_refusal(spec: LinearSpec) -> str | None:
    """Return the property of a packed linear that the format cannot represent; None if there is none."""
    packing = spec.packing
    assert packing is not None
    if packing.bits not in _BITS:
        return f"{packing.bits}-bit integers, and vLLM has kernels for 4 and 8 bits"
    if packing.real_zeros:
        return "zero points that are not integers"
    if packing.activation_bits != 16:
        return f"rounding its activations to {packing.activation_bits} bits after scaling them"
    if packing.input_scales:
        return "a scale per input, which cannot be merged into other weights without rounding these again"
    if packing.group and spec.in_features % packing.group:
        return (
            f"groups of {packing.group}, which do not divide its {spec.in_features} inputs; choose another group, "
            f"or 0"
        )
    return None


def _words(values: int, bits: int) -> int:
    """Return the number of 32-bit words for a row of this many integers."""
    return math.ceil(values * bits / 32)


def _tensors(spec: LinearSpec, packing: Packing) -> dict[str, TensorSpec]:
    """Return the tensors that store a packed weight."""
    groups = packing.groups(spec.in_features)
    tensors = {
        "weight_packed": TensorSpec("I32", (spec.out_features, _words(spec.in_features, packing.bits))),
        "weight_scale": TensorSpec("F16", (spec.out_features, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if not packing.symmetric:
        tensors["weight_zero_point"] = TensorSpec("I32", (_words(spec.out_features, packing.bits), groups))
    return tensors


def _packed(spec: LinearSpec, packing: Packing, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `_tensors`. Our bytes already are the format's words, except for the padding of a row."""
    written = {
        "weight_packed": _as_words(stored["packed"], _words(spec.in_features, packing.bits)),
        "weight_scale": stored["scales"],
        "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
    }
    if not packing.symmetric:
        columns = pack(stored["zeros"].T, packing.bits)
        words = _as_words(columns, _words(spec.out_features, packing.bits))
        written["weight_zero_point"] = words.T.contiguous()
    return written


def _as_words(rows: Int[Tensor, "rows bytes"], words: int) -> Int[Tensor, "rows words"]:
    return rows[:, : words * 4].contiguous().view(torch.int32)
