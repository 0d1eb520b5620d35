"""qat: train the weights as they will be when they are rounded, then round them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jobs.compression import grids, packing
from jobs.compression.grids import Grid
from jobs.context import Context
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Layout, Packing
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule

_TINY = 2.0**-24  # the smallest fp16


@dataclass(frozen=True)
class Qat(Technique):
    """Quantization-aware training: every forward pass rounds the weights to the grids that the file will hold,
    and the original teaches what is left (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 2.2).

    The gradient of the rounded weight is given to the weight as it is (the straight-through estimate of
    Bengio et al. 2013, arXiv:1308.3432), but for those outside their grid, which get none.

    A group's grid is fitted at the start, clipped where the squared error of the weights gains by it; its
    zero point stays, its scale is trained (Esser et al. 2019, LSQ, arXiv:1902.08153, eq. 3). LLM-QAT spans smallest
    to largest weight at every step instead, so that a group's outlier decides its grid. What is trained is the
    logarithm of the scale over its start, so that one learning rate serves grids of all sizes.

    Embedding and head are not trained; with embedding_bits they are rounded at the end, as in rtn.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 3
    paper: ClassVar[str] = (
        "Liu et al. 2023, LLM-QAT, arXiv:2305.17888; Esser et al. 2019, LSQ, arXiv:1902.08153"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    highest_stage: ClassVar[int] = schedule.HIGHEST_STAGE
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})

    bits: int = packing.bits_knob(4)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    learning_rate: float = schedule.learning_rate_knob(1e-4)
    steps: int = schedule.steps_knob()
    batch: int = schedule.batch_knob()
    temperature: float = schedule.temperature_knob()
    hard_weight: float = schedule.hard_weight_knob()

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(self.bits, self.group, self.symmetric)

    @property
    def correction_rank(self) -> int:
        """None: training does what a correction would."""
        return 0

    def output_layout(self, layout: Layout) -> Layout:
        return packing.output_layout(self, layout)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        schedule.check_given(self, context)
        with on_device(model, ""):
            round_in_forward(model, self.packing, self.name())
            schedule.learn(model, self, context)
            pack(model, self.packing)
        packing.pack_tables(model, self)
        return model


def round_in_forward(model: Model, how: Packing, technique: str) -> None:
    """Let every linear of the blocks compute, in place, with its weight rounded to a grid, until `pack`.

    What is trained of it is `parametrizations.weight.original` and `parametrizations.weight.0.change`.
    """
    for name, layer in model.linears().items():
        weight = check_finite(layer.get_parameter("weight").detach(), technique, name)
        parametrize.register_parametrization(layer, "weight", RoundedWeight(weight, how))


def pack(model: Model, how: Packing) -> None:
    """Put a packed linear in the place of each that rounds in its forward pass: it computes the same."""
    for name, layer in model.linears().items():
        parts = cast(parametrize.ParametrizationList, layer.get_submodule("parametrizations.weight"))
        weight, rounded = parts.original.detach(), cast(RoundedWeight, parts[0])
        integers, grid = rounded.integers(weight)
        packing.pack_linear(model, name, integers, grid, how)


class RoundedWeight(nn.Module):
    """Maps a weight to the nearest values of grids of its own, whose scales can be trained.

    change: the natural logarithm of each scale over the one it had at the start.
    """

    start: Tensor
    zeros: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], how: Packing) -> None:
        super().__init__()
        self.packing = how
        grouped = grids.grouped(weight.float(), how)
        grid = grids.fit(grouped, how, torch.ones_like(grouped[0]))
        # An attempt that goes on from a checkpoint fits the same again.
        self.register_buffer("start", grid.scales, persistent=False)
        self.register_buffer("zeros", grid.zeros, persistent=False)
        still = torch.zeros(grid.scales.shape, dtype=DTYPE, device=weight.device)
        self.change = nn.Parameter(still, requires_grad=False)

    def scales(self) -> Float[Tensor, "out groups"]:
        return self.start * self.change.float().exp()

    @torch.no_grad()
    def integers(self, weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], Grid]:
        """What the forward pass rounds to, as the file holds it."""
        grid = _stored(self.scales(), self.zeros, self.packing)
        whole = grid.integers(grids.grouped(weight.float(), self.packing))
        return whole.flatten(1)[:, : weight.shape[1]], grid

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return cast(
            Tensor,
            _Rounded.apply(weight, self.scales(), self.zeros, self.packing),  # type: ignore[no-untyped-call]
        )


def _stored(scales: Tensor, zeros: Tensor, how: Packing) -> Grid:
    """The grid with its scales as the file holds them."""
    return Grid(scales.half().float().clamp_(min=_TINY), zeros, how.bits)


class _Rounded(torch.autograd.Function):
    """ŵ = s (q − z), q = clamp(round(w/s) + z, 0, top), with ∂ŵ/∂w = 1 for weights on the grid and 0 beyond it,
    and ∂ŵ/∂s = q − z − w/s on the grid and q − z beyond it (LSQ, eq. 3).

    Worked out by hand, so that of each weight only the weight itself is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor, how: Packing) -> Tensor:
        grid = _stored(scales, zeros, how)
        ctx.packing = how
        ctx.save_for_backward(weight, scales, zeros)
        values = grid.values(grid.integers(grids.grouped(weight.float(), how)))
        return values.flatten(1)[:, : weight.shape[1]].to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros = ctx.saved_tensors
        how: Packing = ctx.packing
        grid = _stored(scales, zeros, how)
        places = grids.grouped(weight.float(), how)
        steep = grids.grouped(above[0].float(), how)
        whole = grid.integers(places).sub_(zeros.unsqueeze(-1))
        places = places.div_(grid.scales.unsqueeze(-1))
        low, high = -zeros.unsqueeze(-1), 2**how.bits - 1 - zeros.unsqueeze(-1)
        inside = (places >= low) & (places <= high)
        by_scale = (steep * (whole - places * inside)).sum(dim=-1)
        by_weight = (steep * inside).flatten(1)[:, : weight.shape[1]].to(weight.dtype)
        return by_weight, by_scale, None, None
