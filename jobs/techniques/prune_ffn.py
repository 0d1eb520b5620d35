"""prune_ffn: remove the intermediate neurons that contribute least to the output of each feed-forward layer."""

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
from jobs.models.families import FeedForward
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Layout
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class PruneFfn(Technique):
    """Removes the share `ratio` of the intermediate neurons of every block.

    The score of neuron j is ‖W[:, j]‖² · E[a_j²], the energy that it adds to the output: Wanda's score
    (arXiv:2306.11695), squared and summed over a column, as An et al. do for structured pruning. correction, of
    the error of the output:
        none           keeps the remaining weights as they are.
        bias           adds the mean output of the removed neurons, W[:, j] E[a_j], to the bias; the score is then
                       the fluctuation ‖W[:, j]‖² · Var[a_j] (An et al., eq. 4 and 5).
        least_squares  solves for the remaining weights again.
    Widths are rounded to multiples of 32 (of 8 below 1024 neurons), for which vector units are fastest.
    """

    kind: ClassVar[Kind] = "width"
    paper: ClassVar[str] = "An et al. 2023, FLAP, arXiv:2312.11983"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    by_block: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float | str = knob(0.25, Range(0.0, 0.9), "share of intermediate neurons to remove")
    correction: str = knob(
        "least_squares",
        Choice(("none", "bias", "least_squares")),
        "how the remaining weights correct the error",
    )

    @property
    def is_noop(self) -> bool:
        return self.ratio == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        changed, steps = {}, self.for_blocks(layout)
        for block, feed_forward in layout.feed_forwards():
            name = layout.name(block, feed_forward.out)
            out = layout.linears[name]
            width = kept_width(out.in_features, float(steps[block].ratio))
            if width == out.in_features:
                continue
            bias = out.bias or self.correction == "bias"
            changed[name] = dataclasses.replace(out, in_features=width, bias=bias)
            for path in feed_forward.into:
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
        for block, feed_forward in layout.feed_forwards():
            name = layout.name(block, feed_forward.out)
            context.report(block / layout.depth, name)
            width = expected.linears[name].in_features
            with on_device(model, name, *(layout.name(block, path) for path in feed_forward.into)):
                self._prune(model, block, feed_forward, width, grams)
            widths.add(width)
        if len(widths) == 1:
            setattr(model.config, model.family.ffn_key, widths.pop())
        return model

    def _prune(self, model: Model, block: int, feed_forward: FeedForward, width: int, grams: Grams) -> None:
        """Prune one feed-forward layer of a block to `width` neurons, in place."""
        name = f"{model.blocks_name}.{block}.{feed_forward.out}"
        out = cast(nn.Linear, model.module.get_submodule(name))
        if width == out.in_features:
            return
        weight = check_finite(out.weight.detach().float(), self.name(), name)
        gram, mean = grams.gram(name).to(weight.device), grams.mean(name).to(weight.device)
        energy = gram.diagonal()
        if self.correction == "bias":
            energy = gram.diagonal() - mean.square()
        scores = weight.square().sum(dim=0) * energy
        neurons = torch.argsort(scores, descending=True, stable=True)[:width].sort().values
        bias = self._bias(out, weight, mean, neurons)
        pruned = refit(weight, gram, neurons) if self.correction == "least_squares" else weight[:, neurons]
        model.replace(name, linear_of(pruned.to(DTYPE), bias))
        for path in feed_forward.into:
            self._select_rows(model, f"{model.blocks_name}.{block}.{path}", neurons)

    def _bias(
        self,
        out: nn.Linear,
        weight: Float[Tensor, "out in"],
        mean: Float[Tensor, " in"],
        neurons: Int[Tensor, " kept"],
    ) -> Float[Tensor, " out"] | None:
        """Return the bias of the pruned output layer; None if it has none."""
        bias = cast("Tensor | None", out.bias)
        if bias is not None:
            bias = bias.detach().float()
        if self.correction != "bias":
            return bias
        removed = torch.ones_like(mean).index_fill(0, neurons, 0)
        missing = weight @ (removed * mean)
        if bias is None:
            return missing
        return bias + missing

    def _select_rows(self, model: Model, name: str, neurons: Int[Tensor, " kept"]) -> None:
        """Reduce the linear `name`, in place, to the outputs that feed the remaining neurons."""
        layer = cast(nn.Linear, model.module.get_submodule(name))
        rows = check_finite(layer.weight.detach(), self.name(), name)[neurons]
        bias = None
        if layer.bias is not None:
            bias = layer.bias[neurons]
        model.replace(name, linear_of(rows, bias))


def kept_width(width: int, ratio: float) -> int:
    """Return the number of remaining neurons, at most `width`: a positive multiple of 32 (of 8 below 1024)."""
    multiple = 8
    if width >= 1024:
        multiple = 32
    return min(width, max(multiple, round(width * (1 - ratio) / multiple) * multiple))
