"""awq: scale up the weights of strong inputs before rounding, so that they are rounded more finely."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import grids, packing
from jobs.compression.packing import Quantization
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Awq(Technique):
    """Multiplies the weights of input i by s_i = E[x_i²]^(α/2) before rounding to nearest, and the input by 1/s_i.

    α is the value with the least output error. Linears that read the same input share s, as in the paper.
    The error is E‖(W − Q(W s)/s) x‖², which follows exactly from the Gram matrix of the inputs, so that no α
    needs a forward pass. The paper measures the error of a whole attention or feed-forward part on the text
    itself, and uses E|x| as the magnitude of activations.

    The paper folds 1/s into the norm or linear before. That is impossible behind an activation function, and
    in families whose norms are part of the residual stream. Here the packed linear holds 1/s, an fp16 number per
    input, which works everywhere.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv:2306.00978"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    trials: int = knob(
        20, Range(1, 100, integer=True), "number of α to try, evenly spaced from 0 up to but excluding 1"
    )
    clip: bool = knob(
        True, Choice((False, True)), "narrow a grid where clipping outliers lowers the error on the text"
    )

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, self.symmetric, input_scales=True)

    @property
    def layout_change(self) -> Quantization:
        return Quantization(self)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears, steps = model.linears(), self.for_linears(model.layout())
        for index, names in enumerate(grams.sharing.values()):
            context.report(index / len(grams.sharing), names[0])
            with on_device(model, *names):
                layers = {name: cast(nn.Linear, linears[name]) for name in names}
                gram = grams.gram(names[0]).to(model.device)
                for step in dict.fromkeys(steps[name] for name in names):
                    alike = {name: layer for name, layer in layers.items() if steps[name] == step}
                    step._round(model, alike, gram)
        packing.pack_tables(model, self)
        return model

    def _round(self, model: Model, layers: Mapping[str, nn.Linear], gram: Float[Tensor, "in in"]) -> None:
        """Scale these linears, which read the same input, by a common s, and round them."""
        weights = {
            name: check_finite(layer.weight.detach().float(), self.name(), name)
            for name, layer in layers.items()
        }
        scales = best_scales(torch.cat(list(weights.values())), gram, self)
        importance = None
        if self.clip:
            importance = error_weights(gram, scales, self.packing)
        for name, weight in weights.items():
            integers, grid = packing.round_to_nearest(weight * scales, self.packing, importance)
            packing.pack_linear(model, name, integers, grid, self.packing, 1 / scales)
            packing.correct(model, name, weight, gram, self)


def best_scales(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], options: Awq
) -> Float[Tensor, " in"]:
    """Return the s of least error, of the α in 0, 1/trials, 2/trials … < 1 (Lin et al., eq. 4 and 5).

    Grids span all weights during this search; they are narrowed afterwards, as in the paper.
    """
    best, best_error = torch.ones_like(gram[0]), float("inf")
    for trial in range(options.trials):
        scales = scales_for(gram, trial / options.trials)
        error = output_error(weight, gram, scales, options.packing)
        if error < best_error:
            best, best_error = scales, error
    return best


def scales_for(gram: Float[Tensor, "in in"], alpha: float) -> Float[Tensor, " in"]:
    """Return s = E[x²]^(α/2), with its extremes centred on 1, and such that fp16 represents 1/s exactly."""
    energy = gram.diagonal()
    # An input that is always zero keeps s = 1 before centring.
    strength = torch.where(energy > 0, energy.sqrt().pow(alpha), 1.0)
    middle = (strength.amax() * strength.amin()).sqrt()
    return 1 / (strength / middle).clamp(1e-4, 1e4).reciprocal().half().float()


def output_error(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    scales: Float[Tensor, " in"],
    target: Packing,
) -> float:
    """Return E‖(W − Q(W s)/s) x‖² = tr(D G Dᵀ), with D the difference of the weights."""
    integers, grid = packing.round_to_nearest(weight * scales, target)
    rounded = grid.values(grids.grouped(integers, target)).flatten(1)[:, : weight.shape[1]]
    difference = weight - rounded / scales
    return (difference @ gram).mul_(difference).sum().item()


def error_weights(
    gram: Float[Tensor, "in in"], scales: Float[Tensor, " in"], target: Packing
) -> Float[Tensor, "groups columns"]:
    """Return the weight of each scaled weight's squared error, by groups: the energy of its input over s²."""
    return grids.grouped((gram.diagonal() / scales.square()).unsqueeze(0), target)[0]
