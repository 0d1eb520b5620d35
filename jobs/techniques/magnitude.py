"""magnitude: remove the smallest weights of each linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jobs.compression.sparsity import (
    Sparsity,
    dense_weight,
    pattern_knob,
    replace_by_sparse,
    sparsity_knob,
)
from jobs.context import Context
from jobs.knobs import Value
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Technique


@dataclass(frozen=True)
class Magnitude(Technique):
    """Removes the weights of least |w|, compared within each linear, and stores the others as a sparse linear.

    It needs no data. It is the baseline of the other pruning techniques.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = sparsity_knob()
    pattern: str = pattern_knob()

    @property
    def layout_change(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    def ignored_options(self) -> dict[str, Value]:
        return self.layout_change.ignored_options()

    def compress(self, model: Model, context: Context) -> Model:
        expected = self.output_layout(model.layout()).linears
        linears = model.linears()
        for index, (name, layer) in enumerate(linears.items()):
            if expected[name].kept is None:
                continue
            context.report(index / len(linears), name)
            with on_device(model, name):
                weight = dense_weight(layer, self.name(), name)
                mask = self.layout_change.mask_by_linear(weight.abs())
                replace_by_sparse(model, name, weight, mask)
        return model
