"""rtn: round every weight to the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import nn

from jobs import grids
from jobs.context import Context
from jobs.knobs import Choice, knob
from jobs.layers import PackedLinear, check_finite
from jobs.layout import Layout, Packing
from jobs.models import Model
from jobs.technique import Form, Kind, Technique


@dataclass(frozen=True)
class Rtn(Technique):
    """Rounds each weight of the blocks to the nearest value that `bits` bits can tell apart in its group.

    Embeddings, norms and head stay as they are. Needs no data and takes seconds; below 4 bits use gptq.
    """

    kind: ClassVar[Kind] = "bits"
    paper: ClassVar[str] = "Nagel et al. 2021, A White Paper on Neural Network Quantization, arXiv:2106.08295"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    leaves: ClassVar[frozenset[Form]] = frozenset({"packed"})

    bits: int = knob(8, Choice((2, 3, 4, 8)), "bits per weight")
    group: int = knob(
        64, Choice((0, 32, 64, 128)), "weights of a row that share a scale; 0 for the whole row"
    )
    symmetric: bool = knob(False, Choice((False, True)), "grids centred on zero, without zero points")

    @property
    def packing(self) -> Packing:
        return Packing(self.bits, self.group, self.symmetric)

    def outline(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        return layout.packed(self.packing)

    def compress(self, model: Model, context: Context) -> Model:
        self.outline(model.layout())
        linears = model.linears()
        for done, (name, layer) in enumerate(linears.items()):
            context.report(done / len(linears), name)
            dense = cast(nn.Linear, layer)
            weight = check_finite(dense.weight.detach().float(), self.name(), name)
            grouped = grids.grouped(weight, self.packing)
            grid = grids.fit(grouped, self.packing)
            integers = grid.integers(grouped).flatten(1)[:, : weight.shape[1]]
            zeros = grids.stored_zeros(grid, self.packing)
            model.replace(name, PackedLinear.of(integers, grid.scales, zeros, self.packing, dense.bias))
        return model
