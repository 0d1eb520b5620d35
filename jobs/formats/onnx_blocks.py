"""Packed linears and tables in the blocks that ONNX Runtime's operators MatMulNBits and GatherBlockQuantized read.

Both read integers of 2, 4 or 8 bits in blocks of 16 to 256 neighbours of a row, a power of two, each with a scale and,
unless the middle integer stands for zero, a zero point. The first integer of a byte is in its lowest bits; the last
block of a row is padded. github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
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
_ITEM_BYTES = {torch.int8: 1, torch.uint8: 1, torch.float16: 2}


@dataclass(frozen=True)
class Blocks:
    """How the rows of a packed weight are divided into blocks."""

    bits: int
    """Bits of each integer in the file."""
    size: int
    """Integers in a block."""
    number: int
    """Blocks in a row."""

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row of integers."""
        return self.number * self.size * self.bits // 8

    @property
    def zeros_bytes(self) -> int:
        """Return the bytes of one row of integer zero points."""
        return math.ceil(self.number * self.bits / 8)


def smallest_blocks(spec: LinearSpec) -> Blocks | None:
    """Return the blocks that take the fewest bytes, the largest of equal ones; None if no size divides the groups.

    The blocks of a group repeat its scale. Small blocks win where large ones would pad much of a row's last block: a
    row of 576 in groups of 128 takes 9 blocks of 64, not 5 of 128.
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
    """Return `smallest_blocks` of a weight that the format accepts."""
    blocks = smallest_blocks(spec)
    assert blocks is not None, "to_onnx.refusal refuses a weight without blocks"
    return blocks


def block_tensor_bytes(spec: LinearSpec) -> list[int]:
    """Return the bytes of each tensor of `block_tensors`."""
    return [rows * width * _ITEM_BYTES[dtype] for dtype, rows, width in _shapes(spec).values()]


def block_tensors(layer: PackedLinear | PackedEmbedding) -> dict[str, Tensor]:
    """Return the tensors that store a packed weight, without bias and input scales.

    These are packed [out, row bytes], scales [out, blocks] and, unless it is symmetric, zeros: fp16 [out, blocks] if
    they are real, otherwise packed [out, bytes]. If inputs are rounded, packed is int8 [out, in], scales [out, 1].
    """
    spec, packing = layer.spec, layer.packing
    integers = unpack(layer.packed, packing.bits, spec.in_features)
    if rounds_inputs(spec):
        middle = 2 ** (packing.bits - 1)
        signed = integers.to(torch.int16).sub_(middle).to(torch.int8)
        return {"packed": signed, "scales": layer.scales.half()}
    blocks = blocks_of(spec)
    if packing.symmetric:  # move the zero point to the middle of the larger number of bits
        integers = integers + (2 ** (blocks.bits - 1) - 2 ** (packing.bits - 1))
    padded = torch.nn.functional.pad(integers, (0, blocks.number * blocks.size - spec.in_features))
    tensors = {
        "packed": _pack_bytes(padded, blocks.bits),
        "scales": _per_block(layer.scales, spec, blocks).half(),
    }
    if not packing.symmetric:
        zeros = _per_block(layer.zeros, spec, blocks)
        if packing.real_zeros:
            tensors["zeros"] = zeros.half()
        else:
            tensors["zeros"] = _pack_bytes(zeros, blocks.bits)
    return tensors


def rounds_inputs(spec: LinearSpec) -> bool:
    """Return whether a packed linear rounds its inputs.

    MatMulInteger then multiplies 8-bit integers by 8-bit integers, with one scale per row.
    """
    return _packing(spec).activation_bits != 16


def _shapes(spec: LinearSpec) -> dict[str, tuple[torch.dtype, int, int]]:
    """Return the type, rows and columns of each tensor of `block_tensors`."""
    packing, rows = _packing(spec), spec.out_features
    if rounds_inputs(spec):
        return {"packed": (torch.int8, rows, spec.in_features), "scales": (torch.float16, rows, 1)}
    blocks = blocks_of(spec)
    shapes = {
        "packed": (torch.uint8, rows, blocks.row_bytes),
        "scales": (torch.float16, rows, blocks.number),
    }
    if packing.real_zeros:
        shapes["zeros"] = (torch.float16, rows, blocks.number)
    elif not packing.symmetric:
        shapes["zeros"] = (torch.uint8, rows, blocks.zeros_bytes)
    return shapes


def _row_bytes(blocks: Blocks, packing: Packing) -> int:
    size = blocks.row_bytes + 2 * blocks.number
    if packing.symmetric:
        return size
    if packing.real_zeros:
        return size + 2 * blocks.number
    return size + blocks.zeros_bytes


def _bits(packing: Packing) -> int:
    return next(bits for bits in (2, 4, 8) if packing.bits <= bits)


def _packing(spec: LinearSpec) -> Packing:
    assert spec.packing is not None
    return spec.packing


def _per_block(per_group: Tensor, spec: LinearSpec, blocks: Blocks) -> Tensor:
    """Return for each block the value of its group."""
    group = _packing(spec).group or spec.in_features
    starts = torch.arange(blocks.number) * blocks.size
    return per_group[:, (starts // group).clamp(max=per_group.shape[1] - 1)]


def _pack_bytes(values: Int[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out row_bytes"]:
    """Pack each row into whole bytes; `pack` pads it to eight integers."""
    return pack(values, bits)[:, : math.ceil(values.shape[1] * bits / 8)]
