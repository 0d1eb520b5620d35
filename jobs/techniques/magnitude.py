"""magnitude: remove the smallest weights of each linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jobs.compression.sparsity import PATTERNS, Sparsity, dense_weight, keep
from jobs.context import Context
from jobs.knobs import Choice, Range, Value, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Technique


@dataclass(frozen=True)
class Magnitude(Technique):
    """Removes the weights of least |w|, compared within each linear, and stores the rest sparse.

    Needs no data; it is what other ways to choose are held against.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove; half where pattern is n:m")
    pattern: str = knob("unstructured", Choice(PATTERNS), "where weights may go; n:m keeps n of m neighbours")

    def ignored_options(self) -> dict[str, Value]:
        return {} if self.target.group is None else {"sparsity": 0.5}

    @property
    def target(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    @property
    def is_noop(self) -> bool:
        return self.target.is_noop

    def output_layout(self, layout: Layout) -> Layout:
        return self.target.output_layout(layout, self)

    def compress(self, model: Model, context: Context) -> Model:
        expected = self.output_layout(model.layout()).linears
        linears = model.linears()
        for done, (name, layer) in enumerate(linears.items()):
            if expected[name].kept is None:
                continue
            context.report(done / len(linears), name)
            with on_device(model, name):
                weight = dense_weight(layer, self.name(), name)
                keep(model, name, weight, self.target.of_whole(weight.abs()))
        return model
