"""anneal_rank: lower the rank of each linear little by little while the model learns from the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import importance as importance_module
from jobs.compression import low_rank
from jobs.compression.low_rank import root_of
from jobs.context import Context
from jobs.knobs import knob
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Form, Layout
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule
from jobs.training.schedule import Ramp


@dataclass(frozen=True)
class AnnealRank(Technique):
    """Factorizes every linear at full rank and closes, in the course of a distillation, all directions beyond
    the rank that `keep` asks for.

    The linear becomes y = Σ g_i u_i (v_i x), its singular value decomposition on calibration text as in
    svd_llm, and u and v are trained. Those to stay have the gate g_i = 1; the others' are those of
    singular value thresholding (Cai et al. 2010, eq. 2.2) with the spectrum of the start:
    g_i = max(0, 1 − τ/σ_i), with τ rising by a cubic over the first part of the steps, `ramp`, from 0 to the
    largest σ_i beyond the rank. So the weakest close first, and then all are closed: the truncation at the
    end removes nothing. Xu et al. threshold the weight itself between updates; a gate in the forward pass
    needs no decomposition on the way, and no access to the optimizer's copies of the weights.

    Both factors at full rank are up to twice the weights; as directions close, a step takes less time.
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

    keep: float = knob(0.8, low_rank.KEEP, low_rank.KEEP_HELP)
    allocation: str = knob("uniform", low_rank.ALLOCATION, low_rank.ALLOCATION_HELP)
    ramp: float = schedule.ramp_knob()
    learning_rate: float = schedule.learning_rate_knob(3e-4)
    steps: int = schedule.steps_knob()
    batch: int = schedule.batch_knob()
    temperature: float = schedule.temperature_knob()
    hard_weight: float = schedule.hard_weight_knob()

    @property
    def is_noop(self) -> bool:
        return self.keep == 1

    @property
    def exact(self) -> bool:
        return self.is_noop or self.allocation == "uniform"

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        return low_rank.output_layout(layout, self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        schedule.check_given(self, context)
        with on_device(model, ""):
            self._learn(model, layout, context)
        return model

    def _learn(self, model: Model, layout: Layout, context: Context) -> None:
        importance = importance_module.sensitivities(model, context) if self.allocation == "global" else None
        gated = factorize(model, context, self.name())
        spectra = {f"{name}.values": layer.values for name, layer in gated.items()}
        ranks = low_rank.ranks_of(layout.linears, self.keep, spectra, importance)
        ramp = Ramp.of(self.ramp, self.steps)

        def close(done: int) -> None:
            for name, layer in gated.items():
                layer.close(ranks[name], ramp.reached(done))

        close(0)
        schedule.learn(model, self, context, close)
        truncate(model, gated, ranks)


def factorize(model: Model, context: Context, technique: str) -> dict[str, GatedLinear]:
    """Put a gated linear of full rank, all gates open, in the place of every linear of a model."""
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    found = {}
    linears = model.linears()
    for done, (name, layer) in enumerate(linears.items()):
        context.report(done / len(linears), f"decomposing {name}")
        dense = cast(nn.Linear, layer)
        weight = check_finite(dense.weight.detach(), technique, name).float()
        u, v, values = low_rank.terms_of(weight, root_of(grams.gram(name).to(weight.device)).float())
        first = linear_of(v.to(DTYPE).contiguous(), None)
        found[name] = GatedLinear(first, linear_of(u.to(DTYPE).contiguous(), dense.bias), values)
        model.replace(name, found[name])
    return found


def truncate(model: Model, gated: Mapping[str, GatedLinear], ranks: Mapping[str, int]) -> None:
    """Put a factored linear of its rank in the place of each gated one, whose other gates are closed."""
    for name, layer in gated.items():
        # The bias is u's.
        model.replace(name, low_rank.factored(layer.u, layer.u.weight, layer.v.weight, ranks[name], name))


class GatedLinear(nn.Module):
    """y = u(g ⊙ v(x)) with v: in → full, u: full → out, and a gate in [0, 1] for each direction.

    values: what the directions weigh, falling; they close from behind, and closed ones take no time.
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
        alive = len(self.gates)
        seen = nn.functional.linear(x, self.v.weight[:alive]) * self.gates.to(x.dtype)
        return nn.functional.linear(seen, self.u.weight[:, :alive], self.u.bias)
