"""rtn: round every weight to the nearest value of its group's grid."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import nn

from jobs.compression import packing
from jobs.compression.packing import Quantization
from jobs.context import Context
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Technique


@dataclass(frozen=True)
class Rtn(Technique):
    """Rounds each weight of the blocks to the nearest of the 2^bits values of its group's grid.

    It needs no data and takes seconds. Below 4 bits gptq is better. Its low-rank correction minimizes the error
    of the weights, since the inputs are unknown.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Nagel et al. 2021, A White Paper on Neural Network Quantization, arXiv:2106.08295"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR

    bits: int | str = packing.bits_knob(8)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, self.symmetric)

    @property
    def layout_change(self) -> Quantization:
        return Quantization(self)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        linears, steps = model.linears(), self.for_linears(model.layout())
        for index, (name, layer) in enumerate(linears.items()):
            context.report(index / len(linears), name)
            with on_device(model, name):
                weight = check_finite(cast(nn.Linear, layer).weight.detach().float(), self.name(), name)
                integers, grid = packing.round_to_nearest(weight, steps[name].packing)
                packing.pack_linear(model, name, integers, grid, steps[name].packing)
                packing.correct(model, name, weight, None, steps[name])
        packing.pack_tables(model, self)
        return model
