"""mixed: choose the bits of each linear within an average, and round it as gptq does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from jobs.compression import grids, packing
from jobs.compression.importance import sensitivities
from jobs.compression.knapsack import least_error
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Layout, LinearSpec, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.techniques.gptq import Gptq, quantize

_BITS = (2, 3, 4, 8)
"""The bits that errors are computed and cached for, whatever `widths` allows."""


@dataclass(frozen=True)
class Mixed(Technique):
    """Chooses one of `widths`, in bits, for each linear so that the loss rises least at `average_bits`.

    Rounding a linear raises the loss by about ½ s tr(E G Eᵀ): E is the error of its weights after rounding to
    nearest on clipped grids, G the Gram matrix of its inputs, so that the trace is the squared error of its
    outputs, and s the increase of the loss per unit of it (`jobs.compression.importance.sensitivities`). Where
    we depart from the paper: HAWQ-V2 weighs the squared errors of weights by the mean trace of the loss's
    Hessian, and selects from a Pareto front; here the sum is minimized exactly, as a knapsack. Then each linear
    is rounded as in gptq. The average counts the bits of the integers; scales and zero points come on top, and
    are the same for all choices.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 3
    paper: ClassVar[str] = "Dong et al. 2019, HAWQ-V2, arXiv:1911.03852"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "gradients"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})

    average_bits: float = knob(3.5, Range(2.25, 8.0), "bits per weight, on average over the blocks' linears")
    widths: str = knob(
        "2 3 4 8",
        Choice(("2 3 4 8", "2 4 8", "4 8")),
        "allowed bits of a linear; exclude 3 for OpenVINO and ONNX, where 3 bits take the space of 4",
    )
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()

    @property
    def exact(self) -> bool:
        return False

    def output_layout(self, layout: Layout) -> Layout:
        """Return an upper bound: the bytes that an assignment may spend at most.

        The first linears have the next width above the average and the others the next one below, such that
        the whole budget is spent.
        """
        self.check_forms(layout)
        if self.average_bits < min(self._widths):
            raise ValueError(
                f"average_bits={self.average_bits:g} is less than the fewest of widths={self.widths!r}"
            )
        low = max(bits for bits in self._widths if bits <= self.average_bits)
        high = min(bits for bits in self._widths if bits >= self.average_bits)
        remaining = self._budget(layout.linears) - sum(_bytes(spec, low) for spec in layout.linears.values())
        changed = {}
        for name, spec in layout.linears.items():
            bits = low
            if remaining > 0:
                bits = high
            remaining -= _bytes(spec, bits) - _bytes(spec, low)
            changed[name] = dataclasses.replace(spec, packing=self._packing(bits))
        packed = layout.with_linears(changed)
        if self.embedding_bits == 16:
            return packed
        return packed.with_tables_packed(
            packing.table_packing(self.embedding_bits, self.group, self.symmetric)
        )

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        assert context.calibration is not None
        grid_type = "asymmetric"
        if self.symmetric:
            grid_type = "symmetric"
        errors = context.statistics.stored(
            f"rounding-{self.group}-{grid_type}", lambda: (self._errors(model, context), {})
        )
        bits_by_linear = self.choose_bits(layout.linears, errors, sensitivities(model, context))
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        for index, (name, bits) in enumerate(bits_by_linear.items()):
            context.report(index / len(bits_by_linear), name)
            rounding = Gptq(bits=bits, group=self.group, symmetric=self.symmetric)
            with on_device(model, name):
                layer = cast(nn.Linear, linears[name])
                weight = check_finite(layer.weight.detach().float(), self.name(), name)
                integers, grid = quantize(weight, grams.gram(name).to(model.device), rounding)
                packing.pack_linear(model, name, integers, grid, rounding.packing)
        # Embedding and head are not part of the budget: their bits are an option of their own.
        packing.pack_tables(model, Gptq(4, self.group, self.symmetric, self.embedding_bits))
        return model

    def choose_bits(
        self,
        linears: Mapping[str, LinearSpec],
        errors: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
    ) -> dict[str, int]:
        """Return the bits of each linear, from its errors at each of `_BITS` and the loss per unit of error."""
        columns = [_BITS.index(bits) for bits in self._widths]
        costs, losses = [], []
        for name, spec in linears.items():
            costs.append([_bytes(spec, bits) for bits in self._widths])
            losses.append(errors[name][columns].double() * float(importance[name]))
        choices = least_error(torch.tensor(costs), torch.stack(losses), self._budget(linears))
        return {name: self._widths[choice] for name, choice in zip(linears, choices, strict=True)}

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(int(bits) for bits in self.widths.split())

    def _budget(self, linears: Mapping[str, LinearSpec]) -> int:
        """Return the bytes of all integers at the average."""
        return math.floor(self.average_bits * sum(_bytes(spec, 1) for spec in linears.values()))

    def _packing(self, bits: int) -> Packing:
        return Packing(bits, self.group, self.symmetric)

    def _errors(self, model: Model, context: Context) -> dict[str, Tensor]:
        """Return the output errors of each linear at each of `_BITS`, Float[4]."""
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        errors = {}
        for index, (name, layer) in enumerate(linears.items()):
            context.report(index / len(linears), f"rounding errors of {name}")
            with on_device(model, name):
                weight = check_finite(cast(nn.Linear, layer).weight.detach().float(), self.name(), name)
                gram = grams.gram(name).to(model.device)
                errors[name] = torch.tensor(
                    [_output_error(weight, gram, self._packing(bits)) for bits in _BITS]
                )
        return errors


def _bytes(spec: LinearSpec, bits: int) -> int:
    return spec.out_features * Packing(bits, 0, symmetric=True).row_bytes(spec.in_features)


def _output_error(weight: Tensor, gram: Tensor, target: Packing) -> float:
    """Return tr(E G Eᵀ), with E the error of the weight after rounding to nearest."""
    energy = grids.grouped(gram.diagonal().unsqueeze(0), target)[0]
    integers, grid = packing.round_to_nearest(weight, target, energy)
    rounded = grid.values(grids.grouped(integers, target)).flatten(1)[:, : weight.shape[1]]
    error = weight - rounded
    return (error @ gram).mul_(error).sum().item()
