"""Pack small integers into bytes, and unpack them."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn


def pack(values: Int[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out row_bytes"]:
    """Pack unsigned integers below 2**bits, 8 neighbours of a row into `bits` bytes, little end first."""
    out_features, in_features = values.shape
    padded = nn.functional.pad(values, (0, -in_features % 8))
    if 8 % bits == 0:  # whole values to a byte: no wider words are needed
        together = padded.to(torch.uint8).view(out_features, -1, 8 // bits)
        found = together[..., 0].clone()
        for place in range(1, 8 // bits):
            found |= together[..., place] << (bits * place)
        return found
    eights = padded.to(torch.int64).view(out_features, -1, 8)
    shifts = torch.arange(8, device=values.device) * bits
    words: Tensor = (eights << shifts).sum(dim=-1)
    taken = torch.arange(bits, device=values.device) * 8
    return ((words.unsqueeze(-1) >> taken) & 0xFF).to(torch.uint8).view(out_features, -1)


def unpack(packed: UInt8[Tensor, "out row_bytes"], bits: int, in_features: int) -> UInt8[Tensor, "out in"]:
    """The integers that `pack` packed."""
    if bits == 8:
        return packed[:, :in_features]
    out_features = packed.shape[0]
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        apart: Tensor = (packed.unsqueeze(-1) >> places) & (2**bits - 1)
        return apart.view(out_features, -1)[:, :in_features]
    pieces = packed.view(out_features, -1, bits).to(torch.int64)
    words = (pieces << (torch.arange(bits, device=packed.device) * 8)).sum(dim=-1)
    shifts = torch.arange(8, device=packed.device) * bits
    values: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).view(out_features, -1)[:, :in_features]
