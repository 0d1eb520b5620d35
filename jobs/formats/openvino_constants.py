"""Store weights as constants of an OpenVINO graph, and the operations that unpack them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jobs.models.bit_packing import pack, unpack
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear
from jobs.models.layout import LinearSpec, Packing
from jobs.models.model import Model, distinct_tensors, written_dtype

NAME_PREFIX = "slimfront/"
"""Prefix of the names of constants that store the model's weights."""
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32",
               torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """One constant of the graph."""

    data: np.ndarray[Any, Any]
    """Its bytes."""
    type_name: str
    """OpenVINO's name of the element type."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A weight and the constants that store it."""

    parts: Mapping[str, Constant]
    """Either `weight`, or the integers `packed` with `scales` and, unless they are symmetric, `zeros`."""
    shape: tuple[int, ...]
    """Shape of the weight; the constants may be divided into groups."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return a key that is equal for tensors which differ only in values and in the number of rows."""
        return tuple((part, constant.type_name, constant.shape[1:]) for part, constant in self.parts.items())

    @property
    def fills_bytes(self) -> bool:
        """Return whether its integers fill whole bytes, so that rows can be appended."""
        return all(math.prod(constant.shape) % 2 == 0 for constant in self.parts.values())

    def nodes(self, name: str) -> dict[str, Any]:
        """Return a new node for each constant, named after the weight `name`."""
        stem = name.removesuffix("weight")
        nodes = {}
        for part, constant in self.parts.items():
            full_name = stem + part
            if part == "weight":
                full_name = name
            nodes[part] = _constant_node(full_name, constant)
        return nodes

    def value(self, nodes: Mapping[str, Any]) -> Any:
        """Return a new node that computes the weight in fp32 from `nodes`."""
        from openvino import opset13 as op

        if "weight" in nodes:
            return op.convert(nodes["weight"], "f32")
        value = op.convert(nodes["packed"], "f16")
        if "zeros" in nodes:
            value = op.subtract(value, op.convert(nodes["zeros"], "f16"))
        value = op.multiply(value, nodes["scales"])
        if len(self.parts["packed"].shape) > 2:
            value = op.reshape(value, list(self.shape), special_zero=False)
        return op.convert(value, "f32")


def concatenated(tensors: Sequence[StoredTensor]) -> StoredTensor:
    """Concatenate the rows of tensors of one kind whose integers fill whole bytes."""
    parts = {}
    for part, first in tensors[0].parts.items():
        constants = [tensor.parts[part] for tensor in tensors]
        rows = sum(constant.shape[0] for constant in constants)
        data = np.concatenate([constant.data.reshape(-1) for constant in constants])
        parts[part] = Constant(data, first.type_name, (rows, *first.shape[1:]))
    rows = sum(tensor.shape[0] for tensor in tensors)
    return StoredTensor(parts, (rows, *tensors[0].shape[1:]))


def stored_tensors(model: Model) -> dict[str, StoredTensor]:
    """Return all tensors of a model by the names that they have in `jobs.formats.graph.Function`."""
    tensors = {name: _dense(tensor) for name, tensor in distinct_tensors(model.module).items()}
    for name, layer in (*model.linears().items(), *model.tables().items()):
        if isinstance(layer, SparseLinear):
            tensors[f"{name}.weight"] = _dense(layer.weight())
        elif isinstance(layer, (PackedLinear, PackedEmbedding)):
            shape = (layer.spec.out_features, layer.spec.in_features)
            tensors[f"{name}.weight"] = StoredTensor(_packed_constants(layer), shape)
    return tensors


def constant_bytes(spec: LinearSpec) -> Iterator[int]:
    """Yield the bytes of each constant of a linear or a table, its bias and input scales included."""
    weights = spec.out_features * spec.in_features
    if spec.packing is None:
        yield 2 * weights
    else:
        bits, group = _bits(spec.packing), _group(spec)
        scales = spec.out_features
        if group:
            scales = weights // group
        yield math.ceil(weights * bits / 8)
        yield 2 * scales
        if not spec.packing.symmetric and spec.packing.real_zeros:
            yield 2 * scales
        elif not spec.packing.symmetric:
            yield math.ceil(scales * bits / 8)
        if spec.packing.input_scales:
            yield 2 * spec.in_features
    if spec.bias:
        yield 2 * spec.out_features


def _dense(tensor: Tensor) -> StoredTensor:
    written = tensor.detach().to(written_dtype(tensor)).contiguous()
    data = written.reshape(-1).view(torch.uint8).numpy()
    shape = tuple(tensor.shape)
    return StoredTensor({"weight": Constant(data, _TYPE_NAMES[written.dtype], shape)}, shape)


def _constant_node(name: str, constant: Constant) -> Any:
    import openvino

    element_type = getattr(openvino.Type, constant.type_name)
    tensor = openvino.Tensor(constant.data.reshape(-1), openvino.Shape(constant.shape), element_type)
    node = openvino.op.Constant(tensor, shared_memory=False)
    node.set_friendly_name(NAME_PREFIX + name)
    return node


def _packed_constants(layer: PackedLinear | PackedEmbedding) -> dict[str, Constant]:
    """Return the constants of a packed weight."""
    spec, packing = layer.spec, layer.packing
    bits, group = _bits(packing), _group(spec)
    shape: tuple[int, ...] = (spec.out_features, spec.in_features)
    if group:
        shape = (spec.out_features, spec.in_features // group, group)
    scales_shape = (*shape[:-1], 1)

    def per_group(values: Tensor) -> Tensor:
        """Repeat the values of the artifact's groups for OpenVINO's, which may be smaller."""
        if group:
            values = values.repeat_interleave(packing.group // group, dim=1)[:, : scales_shape[1]]
        return values.contiguous()

    integers = unpack(layer.packed, packing.bits, spec.in_features)
    constants: dict[str, Constant] = {}
    if packing.symmetric:
        signed = integers.to(torch.int16) - 2 ** (packing.bits - 1)
        constants["packed"] = Constant(_pack_flat(signed, bits), f"i{bits}", shape)
    else:
        constants["packed"] = Constant(_pack_flat(integers, bits), f"u{bits}", shape)
        zeros = per_group(layer.zeros)
        if packing.real_zeros:
            constants["zeros"] = Constant(zeros.half().numpy().view(np.uint8), "f16", scales_shape)
        else:
            constants["zeros"] = Constant(_pack_flat(zeros, bits), f"u{bits}", scales_shape)
    scales = per_group(layer.scales).half().numpy().view(np.uint8)
    constants["scales"] = Constant(scales, "f16", scales_shape)
    return constants


def _pack_flat(values: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Pack integers of 4 or 8 bits, two's complement if negative, as one row: OpenVINO does not pad each row."""
    flat = (values.to(torch.int16) & (2**bits - 1)).view(1, -1)
    packed = pack(flat, bits)[0, : math.ceil(flat.numel() * bits / 8)]
    return cast("np.ndarray[Any, Any]", packed.numpy())


def _bits(packing: Packing) -> int:
    """Return the bits per integer in the file: OpenVINO multiplies by 4-bit and 8-bit integers; fewer bits take 4."""
    if packing.bits <= 4:
        return 4
    return 8


def _group(spec: LinearSpec) -> int:
    """Return the number of weights per scale in the file, 0 if a row has one scale.

    OpenVINO's groups must divide a row. If the artifact's do not, the group is the greatest common divisor of group
    and row, and the groups within one of the artifact's repeat its scale.
    """
    assert spec.packing is not None
    if spec.packing.group == 0 or spec.packing.group >= spec.in_features:
        return 0
    return math.gcd(spec.packing.group, spec.in_features)
