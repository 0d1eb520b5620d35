"""anneal_rank: lower the rank of each linear step by step while the model learns from the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, SupportsFloat, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import low_rank
from jobs.compression.importance import sensitivities
from jobs.compression.low_rank import Factorization
from jobs.context import Context
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Form, Layout
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule
from jobs.training.schedule import Ramp


@dataclass(frozen=True)
class AnnealRank(Technique):
    """Factorizes every linear at full rank, then closes all directions beyond the target rank during a distillation.

    The linear becomes y = Σ g_i u_i (v_i x), its singular value decomposition on calibration text as in
    svd_llm, and u and v are trained. Directions within the rank of `keep` have the gate g_i = 1. The gates of
    the others are those of singular value thresholding (Cai et al. 2010, eq. 2.2) with the initial singular
    values: g_i = max(0, 1 − τ/σ_i). τ rises by a cubic over the first part of the steps, `ramp`, from 0 to the
    largest σ_i beyond the rank. The weakest directions close first, and in the end all of them, so the final
    truncation changes nothing. Xu et al. threshold the weight itself between updates; a gate in the forward
    pass needs neither further decompositions nor access to the optimizer's copies of the weights.

    Both factors at full rank have up to twice the weights. A step becomes faster as directions close.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 4
    paper: ClassVar[str] = (
        "Xu et al. 2018, Trained rank pruning, arXiv:1812.02402; Cai et al. 2010, Singular value thresholding, "
        "arXiv:0810.3286"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "teacher", "training"})
    highest_stage: ClassVar[int] = schedule.HIGHEST_STAGE
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = low_rank.keep_knob()
    allocation: str = low_rank.allocation_knob()
    ramp: float = schedule.ramp_knob()
    learning_rate: float = schedule.learning_rate_knob(3e-4)
    steps: int = schedule.steps_knob()
    batch: int = schedule.batch_knob()
    temperature: float = schedule.temperature_knob()
    hard_weight: float = schedule.hard_weight_knob()

    @property
    def layout_change(self) -> Factorization:
        return Factorization(self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        schedule.check_inputs(self, context)
        with on_device(model, ""):
            self._learn(model, layout, context)
        return model

    def _learn(self, model: Model, layout: Layout, context: Context) -> None:
        importance: Mapping[str, SupportsFloat] = {}
        if self.allocation == "global":
            importance = sensitivities(model, context)
        gated = factorize(model, context, self.name())
        spectra = {f"{name}.values": layer.values for name, layer in gated.items()}
        ranks = self.layout_change.ranks(layout.linears, spectra, lambda: importance)
        ramp = Ramp.of(self.ramp, self.steps)

        def close_gates(step: int) -> None:
            for name, layer in gated.items():
                layer.close(ranks[name], ramp.share(step))

        close_gates(0)
        schedule.learn(model, self, context, close_gates)
        truncate(model, gated, ranks)


def factorize(model: Model, context: Context, technique: str) -> dict[str, GatedLinear]:
    """Replace every linear of `model`, in place, by a gated linear of full rank with open gates; return those."""
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    gated = {}
    linears = model.linears()
    for index, (name, layer) in enumerate(linears.items()):
        context.report(index / len(linears), f"decomposing {name}")
        dense = cast(nn.Linear, layer)
        weight = check_finite(dense.weight.detach(), technique, name).float()
        root = low_rank.root_of(grams.gram(name).to(weight.device)).float()
        u, v, values = low_rank.terms_of(weight, root)
        first = linear_of(v.to(DTYPE).contiguous(), None)
        second = linear_of(u.to(DTYPE).contiguous(), dense.bias)
        gated[name] = GatedLinear(first, second, values)
        model.replace(name, gated[name])
    return gated


def truncate(model: Model, gated: Mapping[str, GatedLinear], ranks: Mapping[str, int]) -> None:
    """Replace each gated linear, in place, by a factored one of its rank; the gates beyond it must be closed."""
    for name, layer in gated.items():
        # The bias is that of u.
        model.replace(name, low_rank.factored(layer.u, layer.u.weight, layer.v.weight, ranks[name], name))


class GatedLinear(nn.Module):
    """y = u(g ⊙ v(x)) with v: in → full, u: full → out, and a gate in [0, 1] for each direction.

    `values` are the falling singular values. The last directions close first; closed ones are not computed.
    """

    def __init__(self, v: nn.Linear, u: nn.Linear, values: Float[Tensor, " full"]) -> None:
        super().__init__()
        self.v = v
        self.u = u
        self.values = values
        self.gates = torch.ones_like(values)

    def close(self, rank: int, share: float) -> None:
        """Threshold the values beyond the first `rank` by this share of the largest of them."""
        beyond = self.values[rank:].clamp(min=1e-30)
        gates = torch.ones_like(self.values)
        gates[rank:] = (1 - share * beyond[:1] / beyond).clamp(min=0)
        self.gates = gates[: int(gates.count_nonzero())]

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        open_directions = len(self.gates)
        hidden = nn.functional.linear(x, self.v.weight[:open_directions]) * self.gates.to(x.dtype)
        return nn.functional.linear(hidden, self.u.weight[:, :open_directions], self.u.bias)
