"""smoothquant: 8 bits for weights and activations, after moving what is hard to round from these to those."""

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
    """Divides each input by s and multiplies its weights by s, which leaves the product as it is, then
    rounds weights (per output channel) and activations (per token, as they come) to 8 bits, symmetrically.

    Integers multiply integers. The paper folds 1/s into the norm before, and so smooths only what reads a
    norm; here the linear holds 1/s, an fp16 number per input, as awq's does, and every linear is smoothed.
    The file is as small as that of 8-bit weights. Runtimes without integer products round activations as
    well, so that quality is that of integers, and win no speed by it.
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
        self.check_forms(layout)
        return layout.packed(self.packing)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        for done, names in enumerate(grams.sharing.values()):
            context.report(done / len(grams.sharing), names[0])
            with on_device(model, *names):
                layers = {name: cast(nn.Linear, linears[name]) for name in names}
                self._round(model, layers, grams.peak(names[0]).to(model.device))
        return model

    def _round(self, model: Model, layers: Mapping[str, nn.Linear], inputs: Float[Tensor, " in"]) -> None:
        """Smooth and round these linears, which read the same inputs of these peaks, by one s."""
        weights = {
            name: check_finite(layer.weight.detach().float(), self.name(), name)
            for name, layer in layers.items()
        }
        peaks = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()]).amax(dim=0)
        smoothing = smoothing_of(inputs, peaks, self.alpha)
        for name, weight in weights.items():
            integers, grid = packing.round_to_nearest(weight * smoothing, self.packing)
            packing.pack_linear(model, name, integers, grid, self.packing, 1 / smoothing)


def smoothing_of(
    inputs: Float[Tensor, " in"], weights: Float[Tensor, " in"], alpha: float
) -> Float[Tensor, " in"]:
    """s_j = max|x_j|^α / max|W_j|^(1−α) (Xiao et al., eq. 4), such that fp16 holds 1/s to the last digit.

    All s are divided by one number that centres them on 1, which no rounding notices: each token, and each
    output channel, has a scale of its own. An input never seen, or never used, keeps s = 1.
    """
    used = (inputs > 0) & (weights > 0)
    smoothing = inputs.pow(alpha) / weights.pow(1 - alpha)
    if not bool(used.any()):
        return torch.ones_like(inputs)
    known = smoothing[used]
    middle = (known.amax() * known.amin()).sqrt()
    whole = torch.where(used, smoothing / middle, 1.0)
    return 1 / whole.clamp(1e-4, 1e4).reciprocal().half().float()
