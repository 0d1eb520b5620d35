"""sparsegpt: remove weights input by input, and correct each error with the weights of later inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.calibration.hessian import inverse_factor
from jobs.compression.sparsity import (
    Sparsity,
    dense_weight,
    highest,
    pattern_knob,
    replace_by_sparse,
    sparsity_knob,
)
from jobs.context import Context
from jobs.knobs import Range, Value, knob, sequential_knob
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique

_BLOCK = 128
"""Inputs whose weights are selected together, and processed between two updates of all later inputs (the paper's
Bs and B). A multiple of the m of every n:m pattern."""


@dataclass(frozen=True)
class SparseGpt(Technique):
    """Removes the weights that change the outputs least, after the other weights have corrected the error.

    Algorithm 1 of Frantar & Alistarh with a greedy selection by w² / [H⁻¹]_jj. The Hessian is the Gram matrix of
    the parent's inputs on calibration text, so that one pass over the text serves every sparsity and pattern.
    With `sequential` it is that of the outputs of already pruned blocks, as in the paper's code.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Frantar & Alistarh 2023, SparseGPT, arXiv:2301.00774"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = sparsity_knob()
    pattern: str = pattern_knob()
    damping: float = knob(
        0.01, Range(1e-4, 1.0, log=True), "share of the mean diagonal added to the diagonal"
    )
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
        for readers, gram in context.statistics.inputs(
            model, context.calibration, context.report, self.sequential
        ):
            names = [name for name in readers if expected[name].kept is not None]
            if not names:
                continue
            weights = [dense_weight(linears[name], self.name(), name) for name in names]
            corrected, masks = prune(weights, gram, self)
            for name, weight, mask in zip(names, corrected, masks, strict=True):
                replace_by_sparse(model, name, weight, mask)
        return model


def prune(
    weights: list[Float[Tensor, "out in"]], gram: Float[Tensor, "in in"], options: SparseGpt
) -> tuple[list[Float[Tensor, "out in"]], list[Bool[Tensor, "out in"]]]:
    """Return the corrected weights of linears that read the same input, and their masks (algorithm 1).

    The linears are processed as one linear with more rows, but each keeps its own number of weights: in a
    block of inputs from a to b, floor(sparsity · b) − floor(sparsity · a) weights per row are removed.
    """
    target = options.layout_change
    unused = gram.diagonal() == 0
    # The weights of an input that is always zero are removed first and correct nothing.
    weight = torch.where(unused, 0, torch.cat(weights))
    factor = inverse_factor(gram, options.damping, options.name())
    rows = [len(part) for part in weights]
    out_features, in_features = weight.shape
    # Transposed, so that the weights of one input are contiguous and all updates are of whole rows.
    columns = weight.T.contiguous()
    mask = torch.ones_like(columns, dtype=torch.bool)
    errors = torch.empty(_BLOCK, out_features, dtype=weight.dtype, device=weight.device)
    diagonal = factor.diagonal()
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        if target.group is None:
            removed = target.removed_per_row(stop) - target.removed_per_row(start)
            scores = (columns[start:stop] / diagonal[start:stop, None]).square()
            mask[start:stop] = _highest_by_linear(scores, rows, stop - start - removed)
        for index in range(start, stop):
            if target.group and index % target.group == 0:
                group = slice(index, index + target.group)
                scores = (columns[group] / diagonal[group, None]).square()
                mask[group] = highest(scores.T, target.group // 2).T
            # The error is (0 − w)/U_ii for removed weights and 0 for kept ones, so the correction is added.
            error = errors[index - start]
            torch.div(columns[index], -diagonal[index], out=error).masked_fill_(mask[index], 0)
            columns[index].masked_fill_(~mask[index], 0)
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error)
        if stop < in_features:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start])
    return list(torch.split(columns.T, rows)), list(torch.split(mask.T, rows))


def _highest_by_linear(
    scores: Float[Tensor, "block out"], rows: list[int], per_row: int
) -> Bool[Tensor, "block out"]:
    """Return a mask of the highest scores of each linear: `per_row` of them per row on average."""
    masks = [
        highest(part.flatten(), per_row * part.shape[1]).view(part.shape)
        for part in torch.split(scores, rows, dim=1)
    ]
    return torch.cat(masks, dim=1)
