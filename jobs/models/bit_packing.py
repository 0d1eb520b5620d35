"""Pack small integers into bytes, and unpack them."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn


def pack(values: Int[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out row_bytes"]:
    """Pack unsigned integers below 2**bits: 8 neighbours of a row take `bits` bytes, little-endian.

    Rows are padded with zeros to a multiple of 8 integers.
    """
    out_features, in_features = values.shape
    padded = nn.functional.pad(values, (0, -in_features % 8))
    if 8 % bits == 0:  # each byte holds whole integers: no wider words are needed
        grouped = padded.to(torch.uint8).view(out_features, -1, 8 // bits)
        packed = grouped[..., 0].clone()
        for position in range(1, 8 // bits):
            packed |= grouped[..., position] << (bits * position)
        return packed
    groups_of_8 = padded.to(torch.int64).view(out_features, -1, 8)
    shifts = torch.arange(8, device=values.device) * bits
    words: Tensor = (groups_of_8 << shifts).sum(dim=-1)
    byte_shifts = torch.arange(bits, device=values.device) * 8
    return ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8).view(out_features, -1)


def unpack(packed: UInt8[Tensor, "out row_bytes"], bits: int, in_features: int) -> UInt8[Tensor, "out in"]:
    """Return the integers that `pack` packed, without the padding."""
    if bits == 8:
        return packed[:, :in_features]
    out_features = packed.shape[0]
    if 8 % bits == 0:
        bit_shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        integers: Tensor = (packed.unsqueeze(-1) >> bit_shifts) & (2**bits - 1)
        return integers.view(out_features, -1)[:, :in_features]
    word_bytes = packed.view(out_features, -1, bits).to(torch.int64)
    words = (word_bytes << (torch.arange(bits, device=packed.device) * 8)).sum(dim=-1)
    shifts = torch.arange(8, device=packed.device) * bits
    values: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).view(out_features, -1)[:, :in_features]
