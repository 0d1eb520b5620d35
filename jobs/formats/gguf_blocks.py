"""Packed weights in the block types of GGUF.

Integers are stored unchanged, in blocks of 32 that each have an fp16 scale d; a group of 64 becomes two blocks with the
same scale. The linears of the blocks are stored as:

    4, 3 or 2 bits, symmetric      Q4_0   d (q − 8)   exact
    3 or 2 bits, integer zeros     Q4_0               exact: q − zero fits into 4 bits
    4 bits, any zeros              Q4_1   d q + m     m = −d · zero, rounded to fp16: a relative error of 2**-11, or at
                                                      most 0.008 d, compared to 0.5 d from rounding the weight
    8 bits, symmetric              Q8_0   d q         exact
    dense, sparse                  BF16               exact
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jobs.models.bit_packing import unpack
from jobs.models.layout import LinearSpec, Packing

_BLOCK = 32
"""Weights in a block."""


@dataclass(frozen=True)
class Kind:
    """A type of tensors in the file."""

    name: str
    values: int
    """Weights in a block."""
    bytes: int
    """Bytes of a block."""
    file_type: int
    """llama.cpp's number of files in which most tensors have this type."""

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row."""
        return columns // self.values * self.bytes


Q4_0, Q4_1, Q8_0 = Kind("Q4_0", 32, 18, 2), Kind("Q4_1", 32, 20, 3), Kind("Q8_0", 32, 34, 7)
BF16, F32 = Kind("BF16", 1, 2, 32), Kind("F32", 1, 4, 0)


def kind_of(spec: LinearSpec) -> Kind:
    """Return the type that stores the weight of a linear or table: BF16 unless a packed one can be represented."""
    packing = spec.packing
    if packing is None or packing_refusal(spec, packing) is not None:
        return BF16
    if packing.bits == 8:
        return Q8_0
    if packing.symmetric or (packing.bits < 4 and not packing.real_zeros):
        return Q4_0
    return Q4_1


def packing_refusal(spec: LinearSpec, packing: Packing) -> str | None:
    """Return the property of a packed linear that the types of the file cannot represent; None if there is none."""
    if packing.activation_bits != 16:
        return f"rounding its activations to {packing.activation_bits} bits after scaling them"
    if packing.input_scales:
        return "a scale per input, which cannot be merged into other weights without rounding these again"
    if packing.bits == 8 and not packing.symmetric:
        return "8-bit integers with zero points, and Q8_0 has none; symmetric ones are supported"
    if spec.in_features % _BLOCK:
        return f"rows of {spec.in_features}, which are not whole blocks of {_BLOCK}"
    if packing.group % _BLOCK:
        return f"groups of {packing.group}, which are not whole blocks of {_BLOCK}"
    return None


def blocks_of(
    kind: Kind, spec: LinearSpec, tensors: Mapping[str, Tensor], rows: Int[Tensor, " rows"]
) -> UInt8[Tensor, "rows row_bytes"]:
    """Return these rows of a packed linear as blocks of `kind`."""
    packing = spec.packing
    assert packing is not None
    integers = unpack(tensors["packed"][rows], packing.bits, spec.in_features).to(torch.int16)
    scales = tensors["scales"][rows]
    parts = [_per_block(scales, spec, packing)]
    if kind == Q4_1:
        zeros = tensors["zeros"][rows]
        minima = -(scales.float() * zeros.float())
        if not bool(torch.isfinite(minima.half()).all()):
            raise ValueError("scale · zero point exceeds the range of fp16, in which GGUF's Q4_1 stores it")
        parts.append(_per_block(minima.half(), spec, packing))
    else:
        if packing.symmetric:
            integers = integers - 2 ** (packing.bits - 1)
        else:
            integers = integers - _expand_groups(tensors["zeros"][rows], spec, packing)
        if kind == Q4_0:
            integers = integers + 8
    blocks = integers.view(len(rows), -1, _BLOCK)
    if kind == Q8_0:
        parts.append(blocks.to(torch.int8).view(torch.uint8))
    else:
        low, high = blocks.to(torch.uint8).chunk(2, dim=-1)
        parts.append(low | high << 4)
    return torch.cat(parts, dim=-1).flatten(1)


def _per_block(
    per_group: Float[Tensor, "rows groups"], spec: LinearSpec, packing: Packing
) -> UInt8[Tensor, "rows blocks two"]:
    """Return an fp16 number per group as two bytes for each of its blocks."""
    blocks = spec.in_features // _BLOCK
    repeated = per_group.repeat_interleave((packing.group or spec.in_features) // _BLOCK, dim=1)[:, :blocks]
    return repeated.contiguous().unsqueeze(-1).view(torch.uint8)


def _expand_groups(
    zeros: Int[Tensor, "rows groups"], spec: LinearSpec, packing: Packing
) -> Int[Tensor, "rows in"]:
    wide = zeros.to(torch.int16).repeat_interleave(packing.group or spec.in_features, dim=1)
    return wide[:, : spec.in_features]
