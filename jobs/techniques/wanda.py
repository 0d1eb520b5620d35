"""wanda: remove, for each output, the weights of least magnitude times activation norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression.sparsity import (
    Sparsity,
    dense_weight,
    pattern_knob,
    replace_by_sparse,
    sparsity_knob,
)
from jobs.context import Context
from jobs.knobs import Value, sequential_knob
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Wanda(Technique):
    """Removes the weights of least |W_ij| · ‖X_j‖₂, compared within each row, and stores the others as a sparse linear.

    ‖X_j‖₂ is the norm of input j over the calibration text. It is read from the Gram matrix of the parent, so
    that one pass over the text serves every sparsity and pattern. With `sequential` it is the norm of the
    outputs of already pruned blocks, as in the paper's code.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Sun et al. 2023, Wanda, arXiv:2306.11695"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = sparsity_knob()
    pattern: str = pattern_knob()
    sequential: bool = sequential_knob()

    @property
    def layout_change(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    def ignored_options(self) -> dict[str, Value]:
        return self.layout_change.ignored_options()

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
                mask = self.layout_change.mask_by_row(scores(weight, energy))
                replace_by_sparse(model, name, weight, mask)
        return model


def scores(weight: Float[Tensor, "out in"], energy: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Return |W_ij| · ‖X_j‖₂ up to a common factor (Sun et al., eq. 1); `energy` is E[x_j²]."""
    return weight.abs() * energy.sqrt()
