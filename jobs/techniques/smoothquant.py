"""smoothquant: 8 bits for weights and activations, after moving outliers from activations to weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import packing
from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Layout, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Smoothquant(Technique):
    """Divides each input by s and multiplies its weights by s, then rounds weights and activations to 8 bits.

    The product does not change by s. Rounding is symmetric, per output channel for weights and per token for
    activations, so that a kernel can multiply integers. The paper folds 1/s into the norm before, and so
    smooths only the linears that read a norm; here the linear holds 1/s, an fp16 number per input, as in awq,
    and every linear is smoothed. The file has the size of 8-bit weights. Runtimes without integer products
    round activations too: they have the quality of integers but no gain in speed.
    """

    kind: ClassVar[Kind] = "bits"
    paper: ClassVar[str] = "Xiao et al. 2022, SmoothQuant, arXiv:2211.10438"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})

    alpha: float = knob(0.5, Range(0.0, 1.0), "how much of the difficulty moves from activations to weights")

    @property
    def packing(self) -> Packing:
        return Packing(8, 0, symmetric=True, input_scales=True, activation_bits=8)

    def output_layout(self, layout: Layout) -> Layout:
        return super().output_layout(layout).packed(self.packing)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        for index, names in enumerate(grams.sharing.values()):
            context.report(index / len(grams.sharing), names[0])
            with on_device(model, *names):
                layers = {name: cast(nn.Linear, linears[name]) for name in names}
                self._round(model, layers, grams.peak(names[0]).to(model.device))
        return model

    def _round(
        self, model: Model, layers: Mapping[str, nn.Linear], input_peaks: Float[Tensor, " in"]
    ) -> None:
        """Smooth these linears, which read the same input, by a common s, and round them."""
        weights = {
            name: check_finite(layer.weight.detach().float(), self.name(), name)
            for name, layer in layers.items()
        }
        weight_peaks = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()]).amax(dim=0)
        smoothing = smoothing_of(input_peaks, weight_peaks, self.alpha)
        for name, weight in weights.items():
            integers, grid = packing.round_to_nearest(weight * smoothing, self.packing)
            packing.pack_linear(model, name, integers, grid, self.packing, 1 / smoothing)


def smoothing_of(
    input_peaks: Float[Tensor, " in"], weight_peaks: Float[Tensor, " in"], alpha: float
) -> Float[Tensor, " in"]:
    """Return s_j = max|x_j|^α / max|W_j|^(1−α) (Xiao et al., eq. 4), such that fp16 represents 1/s exactly.

    All s are divided by a common number that centres them on 1. This does not affect the rounding, because each
    token and each output channel has its own scale. An input that is always zero, or has only zero weights, keeps
    s = 1.
    """
    used = (input_peaks > 0) & (weight_peaks > 0)
    smoothing = input_peaks.pow(alpha) / weight_peaks.pow(1 - alpha)
    if not bool(used.any()):
        return torch.ones_like(input_peaks)
    used_smoothing = smoothing[used]
    middle = (used_smoothing.amax() * used_smoothing.amin()).sqrt()
    centred = torch.where(used, smoothing / middle, 1.0)
    return 1 / centred.clamp(1e-4, 1e4).reciprocal().half().float()
