"""mixed: give each linear the bits that it needs, within an average, and round it as gptq does."""

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
"""All that errors are found for, whatever may be chosen of them."""


@dataclass(frozen=True)
class Mixed(Technique):
    """Gives each linear one of `widths`, in bits, so that the loss rises least at `average_bits`.

    Rounding a linear raises the loss by about ½ s tr(E G Eᵀ): E is what rounding to nearest on clipped grids
    takes from its weights, G the Gram matrix of its inputs, so that the trace is the outputs' squared error,
    and s what the loss makes of a unit of it (`jobs.compression.importance.sensitivities`). HAWQ-V2 weighs the
    weights' squared errors by the mean trace of the loss's Hessian instead and picks from a Pareto front; here
    the sum is minimized exactly, as a knapsack. Then each linear is rounded with gptq's error feedback.
    The average counts the bits of the integers; scales and zero points come on top, alike for all choices.
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
        "the bits that a linear may get: where 3 take the room of 4, as in OpenVINO and ONNX, better without",
    )
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()

    @property
    def exact(self) -> bool:
        return False

    def output_layout(self, layout: Layout) -> Layout:
        """One linear after the other is given the next more bits than the average, the others the next
        fewer, until as many bytes are spent as any assignment may."""
        self.check_forms(layout)
        if self.average_bits < min(self._widths):
            raise ValueError(
                f"average_bits={self.average_bits:g} is less than the fewest of widths={self.widths!r}"
            )
        low = max(bits for bits in self._widths if bits <= self.average_bits)
        high = min(bits for bits in self._widths if bits >= self.average_bits)
        left = self._budget(layout.linears) - sum(_bytes(spec, low) for spec in layout.linears.values())
        changed = {}
        for name, spec in layout.linears.items():
            bits = high if left > 0 else low
            left -= _bytes(spec, bits) - _bytes(spec, low)
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
        errors = context.statistics.stored(
            f"rounding-{self.group}-{'symmetric' if self.symmetric else 'asymmetric'}",
            lambda: self._errors(model, context),
        )
        chosen = self.bits_of(layout.linears, errors, sensitivities(model, context))
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        for done, (name, bits) in enumerate(chosen.items()):
            context.report(done / len(chosen), name)
            rounding = Gptq(bits=bits, group=self.group, symmetric=self.symmetric)
            with on_device(model, name):
                layer = cast(nn.Linear, linears[name])
                weight = check_finite(layer.weight.detach().float(), self.name(), name)
                integers, grid = quantize(weight, grams.gram(name).to(model.device), rounding)
                packing.pack_linear(model, name, integers, grid, rounding.packing)
        # The tables are not in the budget: their bits are an option of their own.
        packing.pack_tables(model, Gptq(4, self.group, self.symmetric, self.embedding_bits))
        return model

    def bits_of(
        self,
        linears: Mapping[str, LinearSpec],
        errors: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
    ) -> dict[str, int]:
        """The bits of each linear, from its errors at 2, 3, 4 and 8 bits and what they cost the loss."""
        costs = torch.tensor([[_bytes(spec, bits) for bits in self._widths] for spec in linears.values()])
        held = [_BITS.index(bits) for bits in self._widths]
        losses = torch.stack([errors[name][held].double() * float(importance[name]) for name in linears])
        chosen = least_error(costs, losses, self._budget(linears))
        return {name: self._widths[choice] for name, choice in zip(linears, chosen, strict=True)}

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(int(bits) for bits in self.widths.split())

    def _budget(self, linears: Mapping[str, LinearSpec]) -> int:
        """Bytes of integers at the average."""
        return math.floor(self.average_bits * sum(_bytes(spec, 1) for spec in linears.values()))

    def _packing(self, bits: int) -> Packing:
        return Packing(bits, self.group, self.symmetric)

    def _errors(self, model: Model, context: Context) -> tuple[dict[str, Tensor], dict[str, str]]:
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        linears = model.linears()
        found = {}
        for done, (name, layer) in enumerate(linears.items()):
            context.report(done / len(linears), f"rounding errors of {name}")
            with on_device(model, name):
                weight = check_finite(cast(nn.Linear, layer).weight.detach().float(), self.name(), name)
                gram = grams.gram(name).to(model.device)
                found[name] = torch.tensor([_error(weight, gram, self._packing(bits)) for bits in _BITS])
        return found, {}


def _bytes(spec: LinearSpec, bits: int) -> int:
    return spec.out_features * Packing(bits, 0, symmetric=True).row_bytes(spec.in_features)


def _error(weight: Tensor, gram: Tensor, known: Packing) -> float:
    """tr(E G Eᵀ) with E what rounding to nearest takes from the weight."""
    energy = grids.grouped(gram.diagonal().unsqueeze(0), known)[0]
    integers, grid = packing.round_to_nearest(weight, known, energy)
    rounded = grid.values(grids.grouped(integers, known)).flatten(1)[:, : weight.shape[1]]
    error = weight - rounded
    return (error @ gram).mul_(error).sum().item()
