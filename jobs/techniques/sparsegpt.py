"""sparsegpt: remove weights one input after the other, each time mending with those still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.calibration.hessian import inverse_factor
from jobs.compression.sparsity import PATTERNS, Sparsity, dense_weight, highest, keep
from jobs.context import Context
from jobs.knobs import Choice, Range, Value, knob, sequential_knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique

_BLOCK = 128
"""Inputs whose weights are chosen together, and treated between two updates of all later ones (the paper's
Bs and B). A multiple of the m of every n:m."""


@dataclass(frozen=True)
class SparseGpt(Technique):
    """Removes the weights that change the outputs on calibration text least once the rest has made up for it.

    The inputs' Gram matrix is that of the parent, so that one pass over the text serves every sparsity and
    pattern; or, where `sequential`, that of what pruned predecessors give, as in the paper's code.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Frantar & Alistarh 2023, SparseGPT, arXiv:2301.00774"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove; half where pattern is n:m")
    pattern: str = knob("unstructured", Choice(PATTERNS), "where weights may go; n:m keeps n of m neighbours")
    damping: float = knob(
        0.01, Range(1e-4, 1.0, log=True), "share of the mean diagonal added to the diagonal"
    )
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
        for readers, gram in context.statistics.inputs(
            model, context.calibration, context.report, self.sequential
        ):
            names = [name for name in readers if expected[name].kept is not None]
            if not names:
                continue
            weights = [dense_weight(linears[name], self.name(), name) for name in names]
            found = prune(weights, gram, self)
            for name, mended, kept in zip(names, *found, strict=True):
                keep(model, name, mended, kept)
        return model


def prune(
    weights: list[Float[Tensor, "out in"]], gram: Float[Tensor, "in in"], options: SparseGpt
) -> tuple[list[Float[Tensor, "out in"]], list[Bool[Tensor, "out in"]]]:
    """Linears that read the same input, mended, and which of their weights stay (Frantar & Alistarh,
    algorithm 1).

    They are treated as one of more rows, but each keeps its own number of weights: in a block of inputs as
    many as floor(sparsity · in) up to its end leaves of those up to its start.
    """
    target = options.target
    unused = gram.diagonal() == 0
    # What is never read may go first, and mends nothing.
    weight = torch.where(unused, 0, torch.cat(weights))
    factor = inverse_factor(gram, options.damping, options.name())
    rows = [len(one) for one in weights]
    out_features, in_features = weight.shape
    # Transposed: one input's weights lie in a row, and all updates are of whole rows.
    columns = weight.T.contiguous()
    kept = torch.ones_like(columns, dtype=torch.bool)
    errors = torch.empty(_BLOCK, out_features, dtype=weight.dtype, device=weight.device)
    spread = factor.diagonal()
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        if target.group is None:
            removed = target.removed(stop) - target.removed(start)
            scores = (columns[start:stop] / spread[start:stop, None]).square()
            kept[start:stop] = _highest_of_each(scores, rows, stop - start - removed)
        for index in range(start, stop):
            if target.group and index % target.group == 0:
                near = slice(index, index + target.group)
                scores = (columns[near] / spread[near, None]).square()
                kept[near] = highest(scores.T, target.group // 2).T
            # The error is (0 − w)/U_ii where w goes and 0 where it stays, so the mending adds.
            error = errors[index - start]
            torch.div(columns[index], -spread[index], out=error).masked_fill_(kept[index], 0)
            columns[index].masked_fill_(~kept[index], 0)
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error)
        if stop < in_features:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start])
    return list(torch.split(columns.T, rows)), list(torch.split(kept.T, rows))


def _highest_of_each(
    scores: Float[Tensor, "block out"], rows: list[int], per_row: int
) -> Bool[Tensor, "block out"]:
    """Of each linear's outputs, `per_row` of highest score a row on average, compared over all of them."""
    parts = [
        highest(part.flatten(), per_row * part.shape[1]).view(part.shape)
        for part in torch.split(scores, rows, dim=1)
    ]
    return torch.cat(parts, dim=1)
