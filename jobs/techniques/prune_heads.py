"""prune_heads: remove the attention heads that each block's output misses least."""

from __future__ import annotations

import dataclasses
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

    A group is worth the energy that its heads add to the output, tr(W_g G_g W_gᵀ), with W_g their columns of
    the output projection and G_g the Gram matrix of what they give: An et al.'s structured score, with the
    heads' own correlations. Michel et al. 2019 (arXiv:1905.10650) showed that many heads can go, and judged
    them by gradients. Where keys are not shared a group is one head. At least one stays.
    correction: `least_squares` solves for the remaining columns anew, `none` leaves them alone.
    """

    kind: ClassVar[Kind] = "width"
    paper: ClassVar[str] = "An et al. 2023, FLAP, arXiv:2312.11983; Michel et al. 2019, arXiv:1905.10650"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    ratio: float = knob(0.25, Range(0.0, 0.9), "share of key-value groups to remove")
    correction: str = knob(
        "least_squares", Choice(("none", "least_squares")), "how the rest makes up for the removed"
    )

    @property
    def is_noop(self) -> bool:
        return self.ratio == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        changed = {}
        for block in range(layout.depth):
            kept = kept_groups(groups_of(layout, block), self.ratio)
            places = HeadSlices(layout, block)
            for name, rows in places.rows(range(kept)).items():
                changed[name] = dataclasses.replace(layout.linears[name], out_features=len(rows))
            out = places.out
            changed[out] = dataclasses.replace(
                layout.linears[out], in_features=kept * layout.queries_per_key * layout.head_width
            )
        return layout.with_linears(changed)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        if self.output_layout(layout) == layout:
            return model
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        for block in range(layout.depth):
            places = HeadSlices(layout, block)
            context.report(block / layout.depth, places.out)
            with on_device(model, places.out, *places.makers):
                self._prune(model, places, grams)
        fit_heads(model)
        return model

    def _prune(self, model: Model, places: HeadSlices, grams: Grams) -> None:
        groups = groups_of(places.layout, places.block)
        layer = cast(nn.Linear, model.module.get_submodule(places.out))
        weight = check_finite(layer.weight.detach().float(), self.name(), places.out)
        gram = grams.gram(places.out).to(weight.device)
        worth = worths(weight, gram, groups)
        kept = torch.argsort(worth, descending=True, stable=True)[: kept_groups(groups, self.ratio)]
        chosen = kept.sort().values.tolist()
        columns = places.columns(chosen).to(weight.device)
        new = refit(weight, gram, columns) if self.correction == "least_squares" else weight[:, columns]
        model.replace(places.out, linear_of(new.to(DTYPE), layer.bias))
        for name, rows in places.rows(chosen).items():
            read = cast(nn.Linear, model.module.get_submodule(name))
            some = check_finite(read.weight.detach(), self.name(), name)[rows]
            model.replace(name, linear_of(some, None if read.bias is None else read.bias[rows]))


def kept_groups(groups: int, ratio: float) -> int:
    """How many of a block's key-value groups stay: at least one."""
    return max(1, round(groups * (1 - ratio)))


def groups_of(layout: Layout, block: int) -> int:
    """How many key-value groups the attention of a block has."""
    out = layout.linears[layout.name(block, layout.family.attention.out)]
    return out.in_features // (layout.head_width * layout.queries_per_key)


def worths(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], groups: int
) -> Float[Tensor, " groups"]:
    """tr(W_g G_g W_gᵀ) of each group's columns: the energy of what it alone adds to the output."""
    columns = weight.view(len(weight), groups, -1)
    inner = gram.view(groups, columns.shape[2], groups, columns.shape[2])
    each = torch.stack([inner[group, :, group] for group in range(groups)])
    return torch.einsum("ogi,gij,ogj->g", columns, each, columns)


@dataclass(frozen=True)
class HeadSlices:
    """Where the key-value groups of one block lie in its linears."""

    layout: Layout
    block: int

    @property
    def out(self) -> str:
        """The full name of the output projection."""
        return self.layout.name(self.block, self.layout.family.attention.out)

    @property
    def makers(self) -> list[str]:
        """The full names of the linears that make queries, keys and values: one, where they are fused."""
        attention = self.layout.family.attention
        paths = dict.fromkeys((attention.query, attention.key, attention.value))
        return [self._name(path) for path in paths]

    def columns(self, groups: Int[Tensor, " kept"] | list[int]) -> Int[Tensor, " columns"]:
        """The columns of the output projection that read these groups."""
        return _pieces(list(groups), self.layout.queries_per_key * self.layout.head_width)

    def rows(self, groups: range | list[int]) -> dict[str, Int[Tensor, " rows"]]:
        """The rows that make these groups, of each linear that makes queries, keys or values."""
        attention, width = self.layout.family.attention, self.layout.head_width
        wide = self.layout.queries_per_key * width
        some = list(groups)
        if attention.fused == "interleaved":
            return {self._name(attention.query): _pieces(some, 3 * width)}
        if attention.fused == "stacked":
            every = groups_of(self.layout, self.block)
            queries, keys = _pieces(some, wide), _pieces(some, width)
            start = every * wide
            rows = torch.cat([queries, keys + start, keys + start + every * width])
            return {self._name(attention.query): rows}
        return {
            self._name(attention.query): _pieces(some, wide),
            self._name(attention.key): _pieces(some, width),
            self._name(attention.value): _pieces(some, width),
        }

    def _name(self, path: str) -> str:
        return self.layout.name(self.block, path)


def _pieces(groups: list[int], width: int) -> Int[Tensor, " rows"]:
    """The indices of these groups where each takes `width` in a row."""
    return (torch.tensor(groups).unsqueeze(1) * width + torch.arange(width)).flatten()
