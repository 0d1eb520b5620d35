"""awq: scale inputs up where activations are strong, so that the weights that matter are rounded more finely."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import grids, packing
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Layout, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Awq(Technique):
    """Multiplies the weights of input i by s_i = E[x_i²]^(α/2) before they are rounded to nearest, and the
    input by 1/s_i, with the α that lowers the error of the outputs most.

    Linears that read the same input share s, as in the paper. The error is E‖(W − Q(W s)/s) x‖², exactly
    what the Gram matrix of the inputs says, so no α needs a forward pass; the paper measures that of a whole
    attention or feed-forward part, on the text itself, and takes E|x| for the activations' magnitude.

    The paper folds 1/s into the norm or linear before. In families whose norms stand in the stream itself
    that is impossible, and so it is behind an activation function: the packed linear holds 1/s instead, an
    fp16 number per input, which works everywhere.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv:2306.00978"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    trials: int = knob(20, Range(1, 100, integer=True), "how many α are tried, evenly spaced from 0 up to 1")
    clip: bool = knob(
        True, Choice((False, True)), "narrow a grid where clipping outliers lowers the error on the text"
    )

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, self.symmetric, input_scales=True)

    def output_layout(self, layout: Layout) -> Layout:
        return packing.output_layout(self, layout)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears, steps = model.linears(), self.for_linears(model.layout())
        for done, names in enumerate(grams.sharing.values()):
            context.report(done / len(grams.sharing), names[0])
            with on_device(model, *names):
                layers = {name: cast(nn.Linear, linears[name]) for name in names}
                gram = grams.gram(names[0]).to(model.device)
                for step in dict.fromkeys(steps[name] for name in names):
                    alike = {name: layer for name, layer in layers.items() if steps[name] == step}
                    step._round(model, alike, gram)
        packing.pack_tables(model, self)
        return model

    def _round(self, model: Model, layers: Mapping[str, nn.Linear], gram: Float[Tensor, "in in"]) -> None:
        """Scale and round these linears, which read the same, by one s."""
        weights = {
            name: check_finite(layer.weight.detach().float(), self.name(), name)
            for name, layer in layers.items()
        }
        stretch = best_stretch(torch.cat(list(weights.values())), gram, self)
        costs = costs_of(gram, stretch, self.packing) if self.clip else None
        for name, weight in weights.items():
            integers, grid = packing.round_to_nearest(weight * stretch, self.packing, costs)
            packing.pack_linear(model, name, integers, grid, self.packing, 1 / stretch)
            packing.correct(model, name, weight, gram, self)


def best_stretch(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], options: Awq
) -> Float[Tensor, " in"]:
    """The s of the α in 0, 1/trials, 2/trials … < 1 that costs least (Lin et al., eq. 4 and 5).

    Grids span all weights meanwhile; they are narrowed afterwards, as in the paper.
    """
    best, least = torch.ones_like(gram[0]), float("inf")
    for trial in range(options.trials):
        stretch = stretch_of(gram, trial / options.trials)
        cost = cost_of(weight, gram, stretch, options.packing)
        if cost < least:
            best, least = stretch, cost
    return best


def stretch_of(gram: Float[Tensor, "in in"], alpha: float) -> Float[Tensor, " in"]:
    """s = E[x²]^(α/2), its extremes around 1, and such that fp16 holds 1/s to the last digit."""
    energy = gram.diagonal()
    # What is never read says nothing of how to scale it.
    strength = torch.where(energy > 0, energy.sqrt().pow(alpha), 1.0)
    middle = (strength.amax() * strength.amin()).sqrt()
    return 1 / (strength / middle).clamp(1e-4, 1e4).reciprocal().half().float()


def cost_of(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    stretch: Float[Tensor, " in"],
    known: Packing,
) -> float:
    """E‖(W − Q(W s)/s) x‖² = tr(D G Dᵀ) with D the difference of the weights."""
    integers, grid = packing.round_to_nearest(weight * stretch, known)
    rounded = grid.values(grids.grouped(integers, known)).flatten(1)[:, : weight.shape[1]]
    difference = weight - rounded / stretch
    return (difference @ gram).mul_(difference).sum().item()


def costs_of(
    gram: Float[Tensor, "in in"], stretch: Float[Tensor, " in"], known: Packing
) -> Float[Tensor, "groups columns"]:
    """What the square of a stretched weight's error costs, by groups: the energy of the input it meets."""
    return grids.grouped((gram.diagonal() / stretch.square()).unsqueeze(0), known)[0]
