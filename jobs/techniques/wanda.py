"""wanda: remove the weights of each output that the inputs' activations make least of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression.sparsity import PATTERNS, Sparsity, dense_weight, keep
from jobs.context import Context
from jobs.knobs import Choice, Range, Value, knob, sequential_knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Wanda(Technique):
    """Removes the weights of least |W_ij| · ‖X_j‖₂, compared within each row, and stores the rest sparse.

    ‖X_j‖₂ is the norm of input j over the calibration text, read from the Gram matrix of the parent, so that
    one pass serves every sparsity and pattern; or, where `sequential`, of what pruned predecessors give, as
    in the paper's code.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Sun et al. 2023, Wanda, arXiv:2306.11695"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove; half where pattern is n:m")
    pattern: str = knob("unstructured", Choice(PATTERNS), "where weights may go; n:m keeps n of m neighbours")
    sequential: bool = sequential_knob()

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
        if self.is_noop:
            return model
        assert context.calibration is not None
        linears = model.linears()
        for names, gram in context.statistics.inputs(
            model, context.calibration, context.report, self.sequential
        ):
            energy = gram.diagonal()
            for name in names:
                if expected[name].kept is None:
                    continue
                weight = dense_weight(linears[name], self.name(), name)
                keep(model, name, weight, self.target.of_rows(scores(weight, energy)))
        return model


def scores(weight: Float[Tensor, "out in"], energy: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """|W_ij| · ‖X_j‖₂ up to a factor (Sun et al., eq. 1); `energy` is E[x_j²]."""
    return weight.abs() * energy.sqrt()
