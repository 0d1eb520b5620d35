"""Blocks: packed linears and tables as ONNX Runtime's operators take them, MatMulNBits and GatherBlockQuantized.

Both want integers of 2, 4 or 8 bits in blocks of 16 to 256 neighbours of a row, a power of two, each with a scale and,
where zero is not their middle, a zero point. The first integer of a byte stands in its lowest bits; the last block of a
row is filled up. github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jobs.models.bit_packing import pack, unpack
from jobs.models.layers import PackedEmbedding, PackedLinear
from jobs.models.layout import LinearSpec, Packing

_SIZES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Blocks:
    """How a packed weight is cut. bits: of each integer in the file. size: of a block. number: of blocks in a row."""

    bits: int
    size: int
    number: int

    @property
    def row_bytes(self) -> int:
        """Of one row's integers."""
        return self.number * self.size * self.bits // 8

    @property
    def zeros_bytes(self) -> int:
        """Of one row's zero points, where they are whole."""
        return math.ceil(self.number * self.bits / 8)


def smallest_blocks(spec: LinearSpec) -> Blocks | None:
    """The blocks that take the fewest bytes, and of those the largest; None where none fits the groups' borders.

    Blocks smaller than a group share its scale. Smaller ones win where larger would leave much of a row's last one
    empty: a row of 576 in groups of 128 takes 9 blocks of 64, not 5 of 128.
    """
    packing = _packing(spec)
    whole_row = packing.group == 0 or packing.group >= spec.in_features
    candidates = [
        Blocks(_bits(packing), size, math.ceil(spec.in_features / size))
        for size in _SIZES
        if whole_row or packing.group % size == 0
    ]
    return min(candidates, key=lambda blocks: _row_bytes(blocks, packing), default=None)


def blocks_of(spec: LinearSpec) -> Blocks:
    """The blocks of a weight that has some."""
    blocks = smallest_blocks(spec)
    assert blocks is not None, "what has none is refused"
    return blocks


def block_tensor_bytes(spec: LinearSpec) -> list[int]:
    """The bytes of each tensor of `parts`."""
    return [rows * width * _ITEM_BYTES[dtype] for dtype, rows, width in _shapes(spec).values()]


def block_tensors(layer: PackedLinear | PackedEmbedding) -> dict[str, Tensor]:
    """The tensors that hold a packed layer: packed [out, row bytes], scales [out, blocks] and, unless it is symmetric,
    zeros, fp16 [out, blocks] where real, else packed [out, bytes]. Its bias and its input scales are not among them."""
    spec, known = layer.spec, layer.packing
    integers = unpack(layer.packed, known.bits, spec.in_features)
    if rounds_inputs(spec):
        middle = 2 ** (known.bits - 1)
        signed = integers.to(torch.int16).sub_(middle).to(torch.int8)
        return {"packed": signed, "scales": layer.scales.half()}
    blocks = blocks_of(spec)
    if known.symmetric:  # the middle of more bits is their zero
        integers = integers + (2 ** (blocks.bits - 1) - 2 ** (known.bits - 1))
    filled = torch.nn.functional.pad(integers, (0, blocks.number * blocks.size - spec.in_features))
    found = {"packed": _packed(filled, blocks.bits), "scales": _spread(layer.scales, spec, blocks).half()}
    if not known.symmetric:
        zeros = _spread(layer.zeros, spec, blocks)
        found["zeros"] = zeros.half() if known.real_zeros else _packed(zeros, blocks.bits)
    return found


def rounds_inputs(spec: LinearSpec) -> bool:
    """Whether a linear rounds what it reads: then integers multiply integers, of 8 bits whatever they were, with one
    scale to a row (MatMulInteger)."""
    return _packing(spec).activation_bits != 16


_ITEM_BYTES = {torch.int8: 1, torch.uint8: 1, torch.float16: 2}


def _shapes(spec: LinearSpec) -> dict[str, tuple[torch.dtype, int, int]]:
    packing, rows = _packing(spec), spec.out_features
    if rounds_inputs(spec):
        return {"packed": (torch.int8, rows, spec.in_features), "scales": (torch.float16, rows, 1)}
    blocks = blocks_of(spec)
    found = {
        "packed": (torch.uint8, rows, blocks.row_bytes),
        "scales": (torch.float16, rows, blocks.number),
    }
    if packing.real_zeros:
        found["zeros"] = (torch.float16, rows, blocks.number)
    elif not packing.symmetric:
        found["zeros"] = (torch.uint8, rows, blocks.zeros_bytes)
    return found


def _row_bytes(blocks: Blocks, packing: Packing) -> int:
    zeros = 0 if packing.symmetric else 2 * blocks.number if packing.real_zeros else blocks.zeros_bytes
    return blocks.row_bytes + 2 * blocks.number + zeros


def _bits(packing: Packing) -> int:
    return next(bits for bits in (2, 4, 8) if packing.bits <= bits)


def _packing(spec: LinearSpec) -> Packing:
    assert spec.packing is not None
    return spec.packing


def _spread(per_group: Tensor, spec: LinearSpec, blocks: Blocks) -> Tensor:
    """Of each block what its group has."""
    group = _packing(spec).group or spec.in_features
    starts = torch.arange(blocks.number) * blocks.size
    return per_group[:, (starts // group).clamp(max=per_group.shape[1] - 1)]


def _packed(values: Int[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out row_bytes"]:
    """Each row filled up to whole bytes, where `pack` fills it up to eight values."""
    return pack(values, bits)[:, : math.ceil(values.shape[1] * bits / 8)]
