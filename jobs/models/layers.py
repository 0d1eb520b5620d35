"""Layers that stand in for `nn.Linear` and `nn.Embedding`: packed, sparse, of low rank, with rounded activations."""

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
"""Rows of a table that are unpacked at a time: as 64-bit integers, a whole vocabulary would fill memory."""
Rows = slice | Int[Tensor, " rows"]


class PackedLinear(nn.Module):
    """A linear whose weight is stored as packed integers.

    W[o, i] = c[i] · scales[o, g(i)] · (q[o, i] − zeros[o, g(i)]), where g(i) is the group of input i. The
    integers q are packed into bytes, c are the input scales (1 if the packing has none). A symmetric packing has the
    zero point 2**(bits-1) everywhere. Each call unpacks the weight again, which is slow: `jobs.runtimes` unpacks
    once, after loading. Attributes that the packing does not need do not exist.
    """

    packed: Tensor
    """uint8 [out, row bytes], see `jobs.models.bit_packing`."""
    scales: Tensor
    """fp16 [out, groups]."""
    zeros: Tensor
    """[out, groups], fp16 or uint8."""
    input_scales: Tensor
    """fp16 [in]."""
    bias: nn.Parameter | None
    """bf16 [out]."""

    def __init__(self, spec: LinearSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.packing = _packing_of(spec)
        _register_tensors(self, spec, device)

    @staticmethod
    def of(
        integers: Int[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        zeros: Tensor | None,
        packing: Packing,
        bias: Tensor | None,
        input_scales: Float[Tensor, " in"] | None = None,
    ) -> PackedLinear:
        """Return a packed linear of these integers in [0, 2**bits).

        zeros [out, groups] is None if the packing is symmetric, input_scales if it has none.
        """
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
        """Return the weight, input scales included, computed in fp32 and cast to `dtype`."""
        weight = _dequantized(self, slice(None))
        if self.packing.input_scales:
            weight *= self.input_scales.float()
        return weight.to(dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.packing.activation_bits != 16:
            return cast(Tensor, self.dense(x.dtype)(x))
        return nn.functional.linear(x, self.weight(x.dtype), _bias_as(self.bias, x.dtype))

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the layer with its weight unpacked to `dtype`: an `nn.Linear`, or a `RoundingLinear` if the packing
        rounds activations."""
        if self.packing.activation_bits != 16:
            return RoundingLinear(self, dtype)
        return linear_of(self.weight(dtype), self.bias)


class RoundingLinear(nn.Module):
    """A linear of integers that rounds its inputs to integers too, with one scale per token (W8A8).

    y[t, o] = s[t] · scales[o] · Σ_i round(c[i] x[t, i] / s[t]) q[o, i] + b[o] with s[t] = max_i |c[i] x[t, i]| /
    (2**(bits-1) − 1). bf16 represents integers up to 256 exactly, and products are summed in fp32, so it differs from
    integer arithmetic only in how the sum is rounded.
    """

    integers: Tensor
    """[out, in]: q minus its zero point, as floats."""
    scales: Tensor
    """fp32 [out]."""
    input_scales: Tensor | None
    """fp32 [in]."""
    bias: Tensor | None
    """fp32 [out]."""

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = packed.packing.activation_bits
        self.register_buffer("integers", _centred(packed, slice(None)).to(dtype))
        self.register_buffer("scales", packed.scales.float().squeeze(1))
        scaled = packed.packing.input_scales
        self.register_buffer("input_scales", packed.input_scales.float() if scaled else None)
        self.register_buffer("bias", None if packed.bias is None else packed.bias.detach().float())

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        inputs = x.float()
        if self.input_scales is not None:
            inputs = inputs * self.input_scales
        rounded, steps = round_activations(inputs, self.bits)
        output: Tensor = nn.functional.linear(rounded.to(self.integers.dtype), self.integers).float()
        output = output * steps * self.scales
        if self.bias is not None:
            output = output + self.bias
        return output.to(x.dtype)


def round_activations(
    x: Float[Tensor, "... in"], bits: int
) -> tuple[Float[Tensor, "... in"], Float[Tensor, "... 1"]]:
    """Return x / s rounded to integers, and the scale of each token, s = max |x| / (2**(bits-1) − 1)."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    steps = largest / (2 ** (bits - 1) - 1)
    return (x / steps).round(), steps


class PackedEmbedding(nn.Module):
    """An embedding whose table is packed like a `PackedLinear`'s weight; only the rows of its tokens are unpacked."""

    packed: Tensor
    """uint8 [vocabulary, row bytes]."""
    scales: Tensor
    """fp16 [vocabulary, groups]."""
    zeros: Tensor
    """[vocabulary, groups], fp16 or uint8; does not exist in a symmetric packing."""

    def __init__(
        self, spec: LinearSpec, original: nn.Embedding, device: torch.device | str | None = None
    ) -> None:
        """original: the embedding to replace. Its class may do more than a lookup (Gemma's scales the rows), so a copy
        of it, without its weight, looks up tokens in the unpacked rows."""
        super().__init__()
        self.spec = spec
        self.packing = _packing_of(spec)
        _register_tensors(self, spec, device)
        self.lookup = copy.deepcopy(original, {id(original.weight): None})
        # It has an effect in training only, and would have to be an index among the unpacked rows.
        self.padding_idx, self.lookup.padding_idx = original.padding_idx, None

    def weight(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "vocabulary width"]:
        """Return the whole table, unpacked `_ROWS` rows at a time."""
        starts = range(0, self.spec.out_features, _ROWS)
        return torch.cat([_dequantized(self, slice(start, start + _ROWS)).to(dtype) for start in starts])

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        rows, indices = torch.unique(tokens, return_inverse=True)
        table = _dequantized(self, rows).to(torch.bfloat16)
        return cast(Tensor, torch.func.functional_call(self.lookup, {"weight": table}, (indices,)))

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """Return the original embedding with the unpacked table in `dtype`; this layer cannot be used afterwards."""
        self.lookup.weight = nn.Parameter(self.weight(dtype), requires_grad=False)
        self.lookup.padding_idx = self.padding_idx
        return self.lookup


class TiedHead(nn.Module):
    """A head whose weight is the packed token embedding E: y = x Eᵀ + b."""

    bias: nn.Parameter | None

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.table = table
        self.register_parameter("bias", bias)

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... vocabulary"]:
        return nn.functional.linear(x, self.table.weight(x.dtype), _bias_as(self.bias, x.dtype))


class SparseLinear(nn.Module):
    """A linear that stores only the weights that were not pruned, row by row, and a mask of one bit per weight.

    Its file is smaller than a dense one if fewer than 15 of 16 weights are stored. Each call builds the weight again,
    which is slow: `jobs.runtimes` unpacks once, after loading.
    """

    mask: Tensor
    """uint8 [out, row bytes]: one bit per weight, 1 where it is stored."""
    values: Tensor
    """bf16 [stored weights]."""
    bias: nn.Parameter | None
    """bf16 [out]."""

    def __init__(self, spec: LinearSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        _register_tensors(self, spec, device)

    @staticmethod
    def of(
        weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], bias: Tensor | None
    ) -> SparseLinear:
        """Return a sparse linear that stores the weights where `mask` is true, even zeros."""
        out_features, in_features = weight.shape
        spec = LinearSpec(out_features, in_features, bias is not None, kept=int(mask.sum().item()))
        layer = SparseLinear(spec, weight.device)
        layer.mask.copy_(pack(mask, 1))
        layer.values.copy_(weight[mask])
        if bias is not None:
            cast(nn.Parameter, layer.bias).data.copy_(bias)
        return layer

    def kept(self) -> Bool[Tensor, "out in"]:
        """Return the mask of the stored weights."""
        return unpack(self.mask, 1, self.spec.in_features).bool()

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the weight, zeros included, in bf16."""
        mask = self.kept()
        zeros = torch.zeros(mask.shape, dtype=self.values.dtype, device=mask.device)
        return zeros.masked_scatter_(mask, self.values)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return nn.functional.linear(x, self.weight().to(x.dtype), _bias_as(self.bias, x.dtype))

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the layer with its weight unpacked to `dtype`."""
        return linear_of(self.weight().to(dtype), self.bias)


class LowRankLinear(nn.Module):
    """A low-rank linear: y = u(v(x)) with v: in → rank (no bias) and u: rank → out."""

    def __init__(self, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.v = v
        self.u = u

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return cast(Tensor, self.u(self.v(x)))


class CorrectedLinear(nn.Module):
    """A quantized linear with a low-rank correction of its rounding error: y = rounded(x) + u(v(x))."""

    def __init__(self, rounded: nn.Module, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.rounded = rounded
        self.v = v
        self.u = u

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return cast(Tensor, self.rounded(x) + self.u(self.v(x)))


def linear_of(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    """Return an `nn.Linear` of these tensors, not copied; the bias is cast to the weight's dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def check_finite(weight: Tensor, technique: str, name: str) -> Tensor:
    """Return `weight`; raise ValueError if it holds NaN or infinite values."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{technique} needs finite weights: {name} holds NaN or infinite values")
    return weight


def spec_of(layer: nn.Module) -> LinearSpec | None:
    """Return how a linear or an embedding's table is stored; None for any other module."""
    if isinstance(layer, (PackedLinear, SparseLinear, PackedEmbedding)):
        return layer.spec
    if isinstance(layer, nn.Embedding):
        return LinearSpec(layer.weight.shape[0], layer.weight.shape[1], bias=False)
    if isinstance(layer, nn.Linear):
        return LinearSpec(layer.out_features, layer.in_features, layer.bias is not None)
    return None


def _packing_of(spec: LinearSpec) -> Packing:
    if spec.packing is None:
        raise ValueError("a packed layer needs a spec with a packing")
    return spec.packing


def _register_tensors(module: nn.Module, spec: LinearSpec, device: torch.device | str | None) -> None:
    """Register the tensors that store `spec`, filled with zeros: the weight's as buffers, the bias as a parameter."""
    module.register_parameter("bias", None)
    for name, tensor in spec.tensors().items():
        zeros = torch.zeros(tensor.shape, dtype=_DTYPES[tensor.dtype], device=device)
        if name == "bias":
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        else:
            module.register_buffer(name, zeros)


def _centred(layer: PackedLinear | PackedEmbedding, rows: Rows) -> Float[Tensor, "rows in"]:
    """Return the integers of these rows minus their zero points, in fp32."""
    packing, in_features = layer.packing, layer.spec.in_features
    integers = unpack(layer.packed[rows], packing.bits, in_features).float()
    if packing.symmetric:
        return integers.sub_(2 ** (packing.bits - 1))
    return integers.sub_(_expand_groups(layer.zeros[rows], layer.spec))


def _dequantized(layer: PackedLinear | PackedEmbedding, rows: Rows) -> Float[Tensor, "rows in"]:
    """Return these rows of the weight in fp32, without input scales."""
    return _centred(layer, rows).mul_(_expand_groups(layer.scales[rows], layer.spec))


def _expand_groups(per_group: Float[Tensor, "rows groups"], spec: LinearSpec) -> Float[Tensor, "rows in"]:
    """Repeat the value of each group for all its inputs."""
    group = _packing_of(spec).group or spec.in_features
    return per_group.float().repeat_interleave(group, dim=1)[:, : spec.in_features]


def _bias_as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return bias.to(dtype)
