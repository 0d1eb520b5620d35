"""Layers: the forms that a linear takes besides `nn.Linear`, and how their integers are packed into bytes."""

from __future__ import annotations

import copy
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jobs.models.bit_packing import pack, unpack
from jobs.models.layout import LinearSpec, Packing

_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 4096
"""Rows of a table that are unpacked at once: a vocabulary of them, as 64-bit integers, would fill memory."""
Rows = slice | Int[Tensor, " rows"]


def _packing_of(spec: LinearSpec) -> Packing:
    if spec.packing is None:
        raise ValueError("a packed layer needs a spec with a packing")
    return spec.packing


def _hold(module: nn.Module, spec: LinearSpec, device: torch.device | str | None) -> None:
    """Register the tensors that hold `spec`, all zeros: the weight's as buffers, the bias as a parameter."""
    module.register_parameter("bias", None)
    for name, tensor in spec.tensors().items():
        zeros = torch.zeros(tensor.shape, dtype=_DTYPES[tensor.dtype], device=device)
        if name == "bias":
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        else:
            module.register_buffer(name, zeros)


def _centred(layer: PackedLinear | PackedEmbedding, rows: Rows) -> Float[Tensor, "rows in"]:
    """The integers less their zero points, in fp32."""
    packing, in_features = layer.packing, layer.spec.in_features
    integers = unpack(layer.packed[rows], packing.bits, in_features).float()
    if packing.symmetric:
        return integers.sub_(2 ** (packing.bits - 1))
    return integers.sub_(_spread(layer.zeros[rows], layer.spec))


def _dequantized(layer: PackedLinear | PackedEmbedding, rows: Rows) -> Float[Tensor, "rows in"]:
    """These rows of the weight, without input scales, in fp32."""
    return _centred(layer, rows).mul_(_spread(layer.scales[rows], layer.spec))


def _spread(per_group: Float[Tensor, "rows groups"], spec: LinearSpec) -> Float[Tensor, "rows in"]:
    group = _packing_of(spec).group or spec.in_features
    return per_group.float().repeat_interleave(group, dim=1)[:, : spec.in_features]


class PackedLinear(nn.Module):
    """A linear whose weight is W[o, i] = c[i] · scales[o, g(i)] · (q[o, i] − zeros[o, g(i)]), q packed into bytes.

    Symmetric packing has no zeros: the middle 2**(bits-1) takes their place. c are the input scales, 1 where
    the packing has none. The weight is made anew at each call, which is slow; `jobs.runtimes` unpacks once,
    after loading.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    input_scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.packing = _packing_of(spec)
        _hold(self, spec, device)

    @staticmethod
    def of(
        integers: Int[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        zeros: Tensor | None,
        packing: Packing,
        bias: Tensor | None,
        input_scales: Float[Tensor, " in"] | None = None,
    ) -> PackedLinear:
        """The layer that holds these integers in [0, 2**bits); zeros [out, groups] is None where packing is
        symmetric, input_scales where it has none."""
        out_features, in_features = integers.shape
        layer = PackedLinear(
            LinearSpec(out_features, in_features, bias is not None, packing), integers.device
        )
        layer.packed.copy_(pack(integers, packing.bits))
        layer.scales.copy_(scales)
        if zeros is not None:
            layer.zeros.copy_(zeros)
        if input_scales is not None:
            layer.input_scales.copy_(input_scales)
        if bias is not None:
            cast(nn.Parameter, layer.bias).data.copy_(bias)
        return layer

    def weight(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight, computed in fp32. Activations are not rounded by it."""
        weight = _dequantized(self, slice(None))
        if self.packing.input_scales:
            weight *= self.input_scales.float()
        return weight.to(dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.packing.activation_bits != 16:
            return cast(Tensor, self.dense(x.dtype)(x))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight(x.dtype), bias)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The same layer with its weight unpacked once, in `dtype`: an `nn.Linear`, or where activations are
        rounded a `RoundingLinear`."""
        if self.packing.activation_bits != 16:
            return RoundingLinear(self, dtype)
        return linear_of(self.weight(dtype), self.bias)


class RoundingLinear(nn.Module):
    """A linear of integers that rounds what it reads to integers too, one scale per token: W8A8 arithmetic.

    y[t, o] = s[t] · scales[o] · Σ_i round(c[i] x[t, i] / s[t]) q[o, i] + b[o] with s[t] = max_i |c[i] x[t, i]| /
    (2**(bits-1) − 1). Integers up to 256 are whole in bf16 and products are summed in fp32, so rounding is
    all that sets it apart from a float linear, besides the dtype of the sum.
    """

    integers: Tensor
    scales: Tensor
    input_scales: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = packed.packing.activation_bits
        self.register_buffer("integers", _centred(packed, slice(None)).to(dtype))
        self.register_buffer("scales", packed.scales.float().squeeze(1))
        scaled = packed.packing.input_scales
        self.register_buffer("input_scales", packed.input_scales.float() if scaled else None)
        self.register_buffer("bias", None if packed.bias is None else packed.bias.detach().float())

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        read = x.float() if self.input_scales is None else x.float() * self.input_scales
        whole, steps = round_activations(read, self.bits)
        product: Tensor = nn.functional.linear(whole.to(self.integers.dtype), self.integers).float()
        product = product * steps * self.scales
        return (product if self.bias is None else product + self.bias).to(x.dtype)


def round_activations(
    x: Float[Tensor, "... in"], bits: int
) -> tuple[Float[Tensor, "... in"], Float[Tensor, "... 1"]]:
    """The whole numbers nearest to x / s, and s, of which each token has one: its largest |x| / (2**(bits-1) − 1)."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    steps = largest / (2 ** (bits - 1) - 1)
    return (x / steps).round(), steps


class PackedEmbedding(nn.Module):
    """An embedding whose table is held like a `PackedLinear`'s weight; only the rows looked up are unpacked.

    like: the embedding that it stands for. Its class may do more than look rows up (Gemma's scales them),
    so a copy of it, without its weight, looks up in the unpacked rows.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self, spec: LinearSpec, like: nn.Embedding, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.packing = _packing_of(spec)
        _hold(self, spec, device)
        self.lookup = copy.deepcopy(like, {id(like.weight): None})
        # It serves training only, and would have to lie among the rows looked up.
        self.padding, self.lookup.padding_idx = like.padding_idx, None

    def weight(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "vocabulary width"]:
        """The whole table, unpacked some rows at a time."""
        starts = range(0, self.spec.out_features, _ROWS)
        return torch.cat([_dequantized(self, slice(at, at + _ROWS)).to(dtype) for at in starts])

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        rows, places = torch.unique(tokens, return_inverse=True)
        table = _dequantized(self, rows).to(torch.bfloat16)
        return cast(Tensor, torch.func.functional_call(self.lookup, {"weight": table}, (places,)))

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The embedding that this stands for, with its table unpacked once; this layer is of no use after it."""
        self.lookup.weight = nn.Parameter(self.weight(dtype), requires_grad=False)
        self.lookup.padding_idx = self.padding
        return self.lookup


class TiedHead(nn.Module):
    """The head of a model whose packed token embedding is its weight too: y = x Eᵀ + b."""

    bias: nn.Parameter | None

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.table = table
        self.register_parameter("bias", bias)

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... vocabulary"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.table.weight(x.dtype), bias)


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
        _hold(self, spec, device)

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


class CorrectedLinear(nn.Module):
    """A rounded linear and a term of low rank that mends it: y = rounded(x) + u(v(x))."""

    def __init__(self, rounded: nn.Module, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.rounded = rounded
        self.v = v
        self.u = u

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return cast(Tensor, self.rounded(x) + self.u(self.v(x)))


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
    """How a linear is stored, or an embedding's table, whose rows are outputs; None for any other module."""
    if isinstance(layer, (PackedLinear, SparseLinear, PackedEmbedding)):
        return layer.spec
    if isinstance(layer, nn.Embedding):
        return LinearSpec(layer.weight.shape[0], layer.weight.shape[1], bias=False)
    if isinstance(layer, nn.Linear):
        return LinearSpec(layer.out_features, layer.in_features, layer.bias is not None)
    return None
