"""Layers: the forms that a linear takes besides `nn.Linear`, and how their integers are packed into bytes."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from jobs.layout import LinearSpec, Packing


def pack(values: Int[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out row_bytes"]:
    """Pack unsigned integers below 2**bits, 8 neighbours of a row into `bits` bytes, little end first."""
    out_features, in_features = values.shape
    padded = nn.functional.pad(values.to(torch.int64), (0, -in_features % 8))
    eights = padded.view(out_features, -1, 8)
    shifts = torch.arange(8, device=values.device) * bits
    words: Tensor = (eights << shifts).sum(dim=-1)
    taken = torch.arange(bits, device=values.device) * 8
    return ((words.unsqueeze(-1) >> taken) & 0xFF).to(torch.uint8).view(out_features, -1)


def unpack(packed: UInt8[Tensor, "out row_bytes"], bits: int, in_features: int) -> UInt8[Tensor, "out in"]:
    """The integers that `pack` packed."""
    out_features = packed.shape[0]
    pieces = packed.view(out_features, -1, bits).to(torch.int64)
    words = (pieces << (torch.arange(bits, device=packed.device) * 8)).sum(dim=-1)
    shifts = torch.arange(8, device=packed.device) * bits
    values: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).view(out_features, -1)[:, :in_features]


class PackedLinear(nn.Module):
    """A linear whose weight is W[o, i] = scales[o, g(i)] · (q[o, i] − zeros[o, g(i)]), q packed into bytes.

    Symmetric packing has no zeros: the middle 2**(bits-1) takes their place. The weight is made anew at
    each call, which is slow; `jobs.runtimes` unpacks once, after loading.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        if spec.packing is None:
            raise ValueError("a PackedLinear needs a spec with a packing")
        self.spec = spec
        self.packing: Packing = spec.packing
        tensors = spec.tensors()
        self.register_buffer("packed", torch.zeros(tensors["packed"].shape, dtype=torch.uint8, device=device))
        self.register_buffer(
            "scales", torch.zeros(tensors["scales"].shape, dtype=torch.float16, device=device)
        )
        if not self.packing.symmetric:
            zeros = torch.zeros(tensors["zeros"].shape, dtype=torch.uint8, device=device)
            self.register_buffer("zeros", zeros)
        bias = torch.zeros(spec.out_features, dtype=torch.bfloat16, device=device) if spec.bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @staticmethod
    def of(
        integers: Int[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        zeros: Int[Tensor, "out groups"] | None,
        packing: Packing,
        bias: Tensor | None,
    ) -> PackedLinear:
        """The layer that holds these integers in [0, 2**bits); zeros is None where packing is symmetric."""
        out_features, in_features = integers.shape
        layer = PackedLinear(
            LinearSpec(out_features, in_features, bias is not None, packing), integers.device
        )
        layer.packed.copy_(pack(integers, packing.bits))
        layer.scales.copy_(scales)
        if zeros is not None:
            layer.zeros.copy_(zeros)
        if bias is not None:
            cast(nn.Parameter, layer.bias).data.copy_(bias)
        return layer

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in fp32."""
        packing, in_features = self.packing, self.spec.in_features
        integers = unpack(self.packed, packing.bits, in_features).float()
        group = packing.group or in_features
        if packing.symmetric:
            integers -= 2 ** (packing.bits - 1)
        else:
            integers -= self.zeros.float().repeat_interleave(group, dim=1)[:, :in_features]
        return integers * self.scales.float().repeat_interleave(group, dim=1)[:, :in_features]

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight unpacked once, in `dtype`."""
        return linear_of(self.weight().to(dtype), self.bias)


class SparseLinear(nn.Module):
    """A linear of which only the weights that are not zero are held, row by row, and a bit for each place.

    A file of it is smaller where fewer than 15 of 16 weights are kept. The weight is made anew at each
    call, which is slow; `jobs.runtimes` unpacks once, after loading.
    """

    mask: Tensor
    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        for name in ("mask", "values"):
            tensor = spec.tensors()[name]
            dtype = torch.uint8 if name == "mask" else torch.bfloat16
            self.register_buffer(name, torch.zeros(tensor.shape, dtype=dtype, device=device))
        bias = torch.zeros(spec.out_features, dtype=torch.bfloat16, device=device) if spec.bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @staticmethod
    def of(
        weight: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"], bias: Tensor | None
    ) -> SparseLinear:
        """The layer that holds the weights where `kept` is true, whatever their values."""
        out_features, in_features = weight.shape
        spec = LinearSpec(out_features, in_features, bias is not None, kept=int(kept.sum().item()))
        layer = SparseLinear(spec, weight.device)
        layer.mask.copy_(pack(kept, 1))
        layer.values.copy_(weight[kept])
        if bias is not None:
            cast(nn.Parameter, layer.bias).data.copy_(bias)
        return layer

    def kept(self) -> Bool[Tensor, "out in"]:
        """Which weights are held."""
        return unpack(self.mask, 1, self.spec.in_features).bool()

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight with its zeros, in bf16."""
        kept = self.kept()
        return torch.zeros(kept.shape, dtype=self.values.dtype, device=kept.device).masked_scatter_(
            kept, self.values
        )

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight unpacked once, in `dtype`."""
        return linear_of(self.weight().to(dtype), self.bias)


class LowRankLinear(nn.Module):
    """A linear of low rank: y = u(v(x)) with v: in → rank (no bias) and u: rank → out."""

    def __init__(self, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.v = v
        self.u = u

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return cast(Tensor, self.u(self.v(x)))


def linear_of(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    """An `nn.Linear` that holds exactly these tensors, in the weight's dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def check_finite(weight: Tensor, technique: str, name: str) -> Tensor:
    """`weight`, or a ValueError if there is NaN or an infinite value in it."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{technique} needs finite weights: {name} holds NaN or infinite values")
    return weight


def spec_of(layer: nn.Module) -> LinearSpec | None:
    """How a linear is stored; None for a module that is no linear."""
    if isinstance(layer, (PackedLinear, SparseLinear)):
        return layer.spec
    if isinstance(layer, nn.Linear):
        return LinearSpec(layer.out_features, layer.in_features, layer.bias is not None)
    return None
