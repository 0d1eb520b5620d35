"""qat: train the weights through the rounding of the forward pass, then round them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jobs.compression import grids, packing
from jobs.compression.grids import SMALLEST_SCALE, Grid
from jobs.compression.packing import Quantization
from jobs.context import Context
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Packing
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule


@dataclass(frozen=True)
class Qat(Technique):
    """Quantization-aware training: every forward pass rounds the weights to the grids of the file, while the model
    learns from the original (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 2.2).

    The gradient of the rounded weight is used for the weight itself (the straight-through estimator of Bengio et
    al. 2013, arXiv:1308.3432), except for weights outside their grid, whose gradient is zero.

    A group's grid is fitted at the start, clipped to the least squared error of the weights. Its zero point is
    fixed, its scale is trained (Esser et al. 2019, LSQ, arXiv:1902.08153, eq. 3). Where we depart from LLM-QAT:
    it spans the smallest to the largest weight at every step, so that a group's outlier decides its grid. The
    trained parameter is the logarithm of the scale over its initial value, so that one learning rate serves
    grids of all sizes.

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
        """0: training already corrects the rounding error."""
        return 0

    @property
    def layout_change(self) -> Quantization:
        return Quantization(self)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        schedule.check_inputs(self, context)
        with on_device(model, ""):
            round_in_forward(model, self.packing, self.name())
            schedule.learn(model, self, context)
            pack(model, self.packing)
        packing.pack_tables(model, self)
        return model


def round_in_forward(model: Model, target: Packing, technique: str) -> None:
    """Make every linear of the blocks round its weight in the forward pass, in place, until `pack`.

    The trainable parameters of a linear are then `parametrizations.weight.original`, and
    `parametrizations.weight.0.change` of the scales.
    """
    for name, layer in model.linears().items():
        weight = check_finite(layer.get_parameter("weight").detach(), technique, name)
        parametrize.register_parametrization(layer, "weight", RoundedWeight(weight, target))


def pack(model: Model, target: Packing) -> None:
    """Replace each linear that rounds in its forward pass, in place, by a packed linear with the same output."""
    for name, layer in model.linears().items():
        parts = cast(parametrize.ParametrizationList, layer.get_submodule("parametrizations.weight"))
        weight, rounded = parts.original.detach(), cast(RoundedWeight, parts[0])
        integers, grid = rounded.integers(weight)
        packing.pack_linear(model, name, integers, grid, target)


class RoundedWeight(nn.Module):
    """Maps a weight to the nearest values of its grids, whose scales can be trained.

    `change` is the natural logarithm of each scale over its initial value.
    """

    start: Tensor
    zeros: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], target: Packing) -> None:
        super().__init__()
        self.packing = target
        grouped = grids.grouped(weight.float(), target)
        grid = grids.fit(grouped, target, torch.ones_like(grouped[0]))
        # Not in checkpoints: an attempt that resumes from one fits the same grids again.
        self.register_buffer("start", grid.scales, persistent=False)
        self.register_buffer("zeros", grid.zeros, persistent=False)
        unchanged = torch.zeros(grid.scales.shape, dtype=DTYPE, device=weight.device)
        self.change = nn.Parameter(unchanged, requires_grad=False)

    def scales(self) -> Float[Tensor, "out groups"]:
        return self.start * self.change.float().exp()

    @torch.no_grad()
    def integers(self, weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], Grid]:
        """Return the integers and the grid that the forward pass uses, as the file stores them."""
        grid = _stored_grid(self.scales(), self.zeros, self.packing)
        integers = grid.integers(grids.grouped(weight.float(), self.packing))
        return integers.flatten(1)[:, : weight.shape[1]], grid

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return cast(
            Tensor,
            _Rounded.apply(weight, self.scales(), self.zeros, self.packing),  # type: ignore[no-untyped-call]
        )


def _stored_grid(scales: Tensor, zeros: Tensor, target: Packing) -> Grid:
    """Return the grid with its scales rounded to the type that the file stores."""
    return Grid(scales.half().float().clamp_(min=SMALLEST_SCALE), zeros, target.bits)


class _Rounded(torch.autograd.Function):
    """ŵ = s (q − z), q = clamp(round(w/s) + z, 0, top), with a straight-through gradient.

    ∂ŵ/∂w = 1 for weights within the grid and 0 outside; ∂ŵ/∂s = q − z − w/s within the grid and q − z outside
    (LSQ, eq. 3). The backward pass is written by hand, so that it saves one tensor of the weight's size only.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor, target: Packing) -> Tensor:
        grid = _stored_grid(scales, zeros, target)
        ctx.packing = target
        ctx.save_for_backward(weight, scales, zeros)
        values = grid.values(grid.integers(grids.grouped(weight.float(), target)))
        return values.flatten(1)[:, : weight.shape[1]].to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros = ctx.saved_tensors
        target: Packing = ctx.packing
        grid = _stored_grid(scales, zeros, target)
        grouped = grids.grouped(weight.float(), target)
        gradient = grids.grouped(gradients[0].float(), target)
        centred = grid.integers(grouped).sub_(zeros.unsqueeze(-1))
        ratios = grouped.div_(grid.scales.unsqueeze(-1))
        low, high = -zeros.unsqueeze(-1), 2**target.bits - 1 - zeros.unsqueeze(-1)
        inside = (ratios >= low) & (ratios <= high)
        by_scale = (gradient * (centred - ratios * inside)).sum(dim=-1)
        by_weight = (gradient * inside).flatten(1)[:, : weight.shape[1]].to(weight.dtype)
        return by_weight, by_scale, None, None
