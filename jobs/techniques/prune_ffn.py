"""prune_ffn: remove the intermediate neurons of each feed-forward layer that its output misses least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from jobs.calibration.statistics import Grams
from jobs.compression.refit import refit
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.families import FeedForward
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Layout
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class PruneFfn(Technique):
    """Removes the share `ratio` of the intermediate neurons of every block.

    A neuron j is worth ‖W[:, j]‖² · E[a_j²], the energy that it adds to the output: Wanda's score
    (arXiv:2306.11695) squared and summed over a column, as structured pruning has it (An et al.).
    correction, of what the output loses:
        none           leaves the remaining weights alone.
        bias           adds what the removed neurons give on average, W[:, j] E[a_j], to the bias; there a
                       neuron is worth its fluctuation ‖W[:, j]‖² · Var[a_j] (An et al., eq. 4 and 5).
        least_squares  solves for the remaining weights anew.
    Widths stay multiples of 32 (of 8 below 1024 neurons), which vector units like.
    """

    kind: ClassVar[Kind] = "width"
    paper: ClassVar[str] = "An et al. 2023, FLAP, arXiv:2312.11983"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    by_block: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float | str = knob(0.25, Range(0.0, 0.9), "share of intermediate neurons to remove")
    correction: str = knob(
        "least_squares", Choice(("none", "bias", "least_squares")), "how the rest makes up for the removed"
    )

    @property
    def is_noop(self) -> bool:
        return self.ratio == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        changed, steps = {}, self.for_blocks(layout)
        for block, one in layout.feed_forwards():
            name = layout.name(block, one.out)
            out = layout.linears[name]
            width = kept_width(out.in_features, float(steps[block].ratio))
            if width == out.in_features:
                continue
            bias = out.bias or self.correction == "bias"
            changed[name] = dataclasses.replace(out, in_features=width, bias=bias)
            for path in one.into:
                into = layout.name(block, path)
                changed[into] = dataclasses.replace(layout.linears[into], out_features=width)
        return layout.with_linears(changed)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        expected = self.output_layout(layout)
        if expected == layout:
            return model
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        widths = set()
        for block, one in layout.feed_forwards():
            name = layout.name(block, one.out)
            context.report(block / layout.depth, name)
            width = expected.linears[name].in_features
            with on_device(model, name, *(layout.name(block, path) for path in one.into)):
                self._prune(model, block, one, width, grams)
            widths.add(width)
        if len(widths) == 1:
            setattr(model.config, model.family.ffn_key, widths.pop())
        return model

    def _prune(self, model: Model, block: int, one: FeedForward, width: int, grams: Grams) -> None:
        name = f"{model.blocks_name}.{block}.{one.out}"
        out = cast(nn.Linear, model.module.get_submodule(name))
        if width == out.in_features:
            return
        weight = check_finite(out.weight.detach().float(), self.name(), name)
        gram, mean = grams.gram(name).to(weight.device), grams.mean(name).to(weight.device)
        energy = gram.diagonal() - mean.square() if self.correction == "bias" else gram.diagonal()
        worth = weight.square().sum(dim=0) * energy
        kept = torch.argsort(worth, descending=True, stable=True)[:width].sort().values
        bias = None if out.bias is None else out.bias.detach().float()
        if self.correction == "bias":
            removed = torch.ones_like(worth).index_fill(0, kept, 0)
            bias = (0 if bias is None else bias) + weight @ (removed * mean)
        new = refit(weight, gram, kept) if self.correction == "least_squares" else weight[:, kept]
        model.replace(name, linear_of(new.to(DTYPE), bias))
        for path in one.into:
            into = f"{model.blocks_name}.{block}.{path}"
            layer = cast(nn.Linear, model.module.get_submodule(into))
            rows = check_finite(layer.weight.detach(), self.name(), into)[kept]
            model.replace(into, linear_of(rows, None if layer.bias is None else layer.bias[kept]))


def kept_width(width: int, ratio: float) -> int:
    """How many of `width` neurons stay: a multiple of 32 (of 8 below 1024), at least one such, never more."""
    multiple = 32 if width >= 1024 else 8
    return min(width, max(multiple, round(width * (1 - ratio) / multiple) * multiple))
