"""magnitude: remove the smallest weights of each linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jobs.context import Context
from jobs.knobs import Choice, Range, Value, knob
from jobs.layout import Layout
from jobs.model import Model
from jobs.residency import resident
from jobs.sparsity import PATTERNS, Sparsity, dense_weight, keep
from jobs.technique import Form, Kind, Technique


@dataclass(frozen=True)
class Magnitude(Technique):
    """Removes the weights of least |w|, compared within each linear, and stores the rest sparse.

    Needs no data; it is what other ways to choose are held against.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    leaves: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove; half where pattern is n:m")
    pattern: str = knob("unstructured", Choice(PATTERNS), "where weights may go; n:m keeps n of m neighbours")

    def idle(self) -> dict[str, Value]:
        return {} if self.target.group is None else {"sparsity": 0.5}

    @property
    def target(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    @property
    def identity(self) -> bool:
        return self.target.identity

    def outline(self, layout: Layout) -> Layout:
        return self.target.outline(layout, self)

    def compress(self, model: Model, context: Context) -> Model:
        expected = self.outline(model.layout()).linears
        linears = model.linears()
        for done, (name, layer) in enumerate(linears.items()):
            if expected[name].kept is None:
                continue
            context.report(done / len(linears), name)
            with resident(model, name):
                weight = dense_weight(layer, self.name(), name)
                keep(model, name, weight, self.target.of_whole(weight.abs()))
        return model
