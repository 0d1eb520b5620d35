"""prune_heads: remove the attention heads that contribute least to the output of each block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.calibration.statistics import Grams
from jobs.compression.refit import refit
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Layout
from jobs.models.model import DTYPE, Model, fit_heads
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class PruneHeads(Technique):
    """Removes the share `ratio` of the key-value groups of every block, with the query heads that share them.

    The score of a group is the energy that its heads add to the output, tr(W_g G_g W_gᵀ), with W_g their columns
    of the output projection and G_g the Gram matrix of their outputs: An et al.'s structured score, plus the
    correlations within a group. Michel et al. 2019 (arXiv:1905.10650) showed that many heads can be removed, and
    scored them by gradients. If keys are not shared, a group is one head. At least one group remains. correction:
    `least_squares` solves for the remaining columns again, `none` keeps them as they are.
    """

    kind: ClassVar[Kind] = "width"
    paper: ClassVar[str] = "An et al. 2023, FLAP, arXiv:2312.11983; Michel et al. 2019, arXiv:1905.10650"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    ratio: float = knob(0.25, Range(0.0, 0.9), "share of key-value groups to remove")
    correction: str = knob(
        "least_squares", Choice(("none", "least_squares")), "how the remaining weights correct the error"
    )

    @property
    def is_noop(self) -> bool:
        return self.ratio == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        changed = {}
        for block in range(layout.depth):
            remaining = kept_groups(groups_of(layout, block), self.ratio)
            slices = HeadSlices(layout, block)
            for name, rows in slices.rows(range(remaining)).items():
                changed[name] = dataclasses.replace(layout.linears[name], out_features=len(rows))
            out = slices.out
            width = remaining * layout.queries_per_key * layout.head_width
            changed[out] = dataclasses.replace(layout.linears[out], in_features=width)
        return layout.with_linears(changed)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        if self.output_layout(layout) == layout:
            return model
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        for block in range(layout.depth):
            slices = HeadSlices(layout, block)
            context.report(block / layout.depth, slices.out)
            with on_device(model, slices.out, *slices.projections):
                self._prune(model, slices, grams)
        fit_heads(model)
        return model

    def _prune(self, model: Model, slices: HeadSlices, grams: Grams) -> None:
        """Prune the attention of one block, in place."""
        groups = groups_of(slices.layout, slices.block)
        layer = cast(nn.Linear, model.module.get_submodule(slices.out))
        weight = check_finite(layer.weight.detach().float(), self.name(), slices.out)
        gram = grams.gram(slices.out).to(weight.device)
        scores = group_scores(weight, gram, groups)
        best = torch.argsort(scores, descending=True, stable=True)[: kept_groups(groups, self.ratio)]
        remaining = best.sort().values.tolist()
        columns = slices.columns(remaining).to(weight.device)
        pruned = refit(weight, gram, columns) if self.correction == "least_squares" else weight[:, columns]
        model.replace(slices.out, linear_of(pruned.to(DTYPE), layer.bias))
        for name, rows in slices.rows(remaining).items():
            projection = cast(nn.Linear, model.module.get_submodule(name))
            projection_weight = check_finite(projection.weight.detach(), self.name(), name)[rows]
            bias = None
            if projection.bias is not None:
                bias = projection.bias[rows]
            model.replace(name, linear_of(projection_weight, bias))


def kept_groups(groups: int, ratio: float) -> int:
    """Return the number of a block's key-value groups that remain: at least one."""
    return max(1, round(groups * (1 - ratio)))


def groups_of(layout: Layout, block: int) -> int:
    """Return the number of key-value groups in the attention of a block."""
    out = layout.linears[layout.name(block, layout.family.attention.out)]
    return out.in_features // (layout.head_width * layout.queries_per_key)


def group_scores(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], groups: int
) -> Float[Tensor, " groups"]:
    """Return tr(W_g G_g W_gᵀ) of each group's columns: the energy that the group alone adds to the output."""
    columns = weight.view(len(weight), groups, -1)
    inner = gram.view(groups, columns.shape[2], groups, columns.shape[2])
    group_grams = torch.stack([inner[group, :, group] for group in range(groups)])
    return torch.einsum("ogi,gij,ogj->g", columns, group_grams, columns)


@dataclass(frozen=True)
class HeadSlices:
    """The rows and columns of the key-value groups of one block in its linears."""

    layout: Layout
    block: int

    @property
    def out(self) -> str:
        """The full name of the output projection."""
        return self.layout.name(self.block, self.layout.family.attention.out)

    @property
    def projections(self) -> list[str]:
        """The full names of the linears that compute queries, keys and values; a single one if they are fused."""
        attention = self.layout.family.attention
        paths = dict.fromkeys((attention.query, attention.key, attention.value))
        return [self._name(path) for path in paths]

    def columns(self, groups: Sequence[int]) -> Int[Tensor, " columns"]:
        """Return the columns of the output projection that read these groups."""
        return _indices(groups, self.layout.queries_per_key * self.layout.head_width)

    def rows(self, groups: Sequence[int]) -> dict[str, Int[Tensor, " rows"]]:
        """Return, by full name of the linear that computes queries, keys or values, the rows of these groups."""
        attention, width = self.layout.family.attention, self.layout.head_width
        query_width = self.layout.queries_per_key * width
        if attention.fused == "interleaved":
            return {self._name(attention.query): _indices(groups, 3 * width)}
        queries, keys = _indices(groups, query_width), _indices(groups, width)
        if attention.fused == "stacked":
            all_groups = groups_of(self.layout, self.block)
            start = all_groups * query_width
            rows = torch.cat([queries, keys + start, keys + start + all_groups * width])
            return {self._name(attention.query): rows}
        return {
            self._name(attention.query): queries,
            self._name(attention.key): keys,
            self._name(attention.value): keys,
        }

    def _name(self, path: str) -> str:
        return self.layout.name(self.block, path)


def _indices(groups: Sequence[int], width: int) -> Int[Tensor, " rows"]:
    """Return the indices of these groups if each occupies `width` consecutive ones."""
    return (torch.tensor(list(groups)).unsqueeze(1) * width + torch.arange(width)).flatten()
