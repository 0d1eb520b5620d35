"""Sparsity: the number of weights that each linear keeps, and their selection by scores and a pattern."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jobs.knobs import Choice, Range, Value, knob
from jobs.models.layers import SparseLinear, check_finite
from jobs.models.layout import Layout
from jobs.models.model import DTYPE, Model

PATTERNS = ("unstructured", "2:4", "4:8")
_IGNORED_SHARE = 0.5
"""The value of the option `sparsity` with an n:m pattern, which removes half of the weights in any case."""


def sparsity_knob() -> Any:
    return knob(
        0.5, Range(0.0, 0.95), "share of the weights to remove; without effect (half) if pattern is n:m"
    )


def pattern_knob() -> Any:
    return knob(
        "unstructured", Choice(PATTERNS), "positions of removed weights; n:m keeps n of m neighbours in a row"
    )


@dataclass(frozen=True)
class Sparsity:
    """The layout change of techniques that remove single weights (`jobs.technique.LayoutChange`)."""

    share: float
    """The share of each linear's weights to remove, if `pattern` is "unstructured".

    Then floor(share · in) weights are removed per row on average, so that the number of weights follows from
    shapes alone. A linear that is too narrow to lose a weight per row stays dense.
    """
    pattern: str = "unstructured"
    """One of `PATTERNS`. With n:m, n of each m neighbours in a row remain, whatever `share` is, and the number
    of inputs of every linear must be a multiple of m."""
    across_linears: bool = False
    """Whether the weights of all linears compete, so that the data decide how many each keeps."""

    @property
    def is_noop(self) -> bool:
        return self.group is None and self.share == 0

    @property
    def exact(self) -> bool:
        return not self.across_linears

    @property
    def group(self) -> int | None:
        """m of an n:m pattern; None if the pattern is unstructured."""
        if self.pattern == "unstructured":
            return None
        return int(self.pattern.partition(":")[2])

    def ignored_options(self) -> dict[str, Value]:
        """Return the fixed value of the option `sparsity` where the pattern alone decides."""
        if self.group is None:
            return {}
        return {"sparsity": _IGNORED_SHARE}

    def removed_per_row(self, in_features: int) -> int:
        """Return the number of weights removed per row: of every row with n:m, on average otherwise."""
        if self.group:
            return in_features // 2
        # A share of 0.29 of 100 weights is 28.999999999999996 in binary.
        return math.floor(self.share * in_features + 1e-9)

    def apply(self, layout: Layout, technique: str) -> Layout:
        """Return the layout with sparse linears.

        With `across_linears` only the total number of kept weights is known: it is spread evenly over the
        linears, and linears that would stay dense are sparse ones with all their weights.

        Raises ValueError if the number of inputs of a linear is not a multiple of m.
        """
        changed = {}
        for name, spec in layout.linears.items():
            if self.group and spec.in_features % self.group:
                raise ValueError(
                    f"{technique}.pattern={self.pattern}: {name} has {spec.in_features} inputs, which "
                    f"are not a multiple of {self.group}"
                )
            removed = self.removed_per_row(spec.in_features)
            if removed or (self.across_linears and not self.is_noop):
                remaining = spec.out_features * (spec.in_features - removed)
                changed[name] = dataclasses.replace(spec, kept=remaining)
        return layout.with_linears(changed)

    def mask_by_row(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return a mask of the highest scores: equally many in each row, or n of each m neighbours."""
        out_features, in_features = scores.shape
        if self.group is None:
            return highest(scores, in_features - self.removed_per_row(in_features))
        neighbours = scores.reshape(out_features, -1, self.group)
        return highest(neighbours, self.group // 2).view(out_features, in_features)

    def mask_by_linear(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return a mask of the highest scores of the whole linear, or of n of each m neighbours."""
        if self.group is not None:
            return self.mask_by_row(scores)
        out_features, in_features = scores.shape
        remaining = out_features * (in_features - self.removed_per_row(in_features))
        return highest(scores.flatten(), remaining).view(out_features, in_features)


def highest(scores: Float[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """Return a mask of the `count` highest scores along the last dimension; of equal scores, the first ones.

    Scores must not be NaN.
    """
    size = scores.shape[-1]
    if count == size:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    lowest = scores.kthvalue(size - count + 1, dim=-1, keepdim=True).values
    above, equal = scores > lowest, scores == lowest
    ties = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= ties))


def dense_weight(layer: nn.Module, technique: str, name: str) -> Float[Tensor, "out in"]:
    """Return the weight of a dense linear in fp32; ValueError if it is not finite."""
    return check_finite(layer.get_parameter("weight").detach(), technique, name).float()


def replace_by_sparse(
    model: Model, name: str, weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]
) -> None:
    """Replace the dense linear `name` by a sparse one with the values of `weight` where `mask` is true."""
    layer = cast(nn.Linear, model.module.get_submodule(name))
    model.replace(name, SparseLinear.of(weight.to(DTYPE), mask, layer.bias))


@dataclass(frozen=True)
class Threshold:
    """The lowest score to keep, among the scores of several tensors."""

    lowest: float
    ties: int
    """The number of scores to keep, in the remaining tensors, that equal `lowest`."""

    def mask(self, scores: Float[Tensor, "..."]) -> tuple[Bool[Tensor, "..."], Threshold]:
        """Return the mask for one tensor (of equal scores, the first ones), and the threshold for the next tensors."""
        equal = scores == self.lowest
        selected = equal & (equal.flatten().cumsum(dim=0).view(equal.shape) <= self.ties)
        return (scores > self.lowest) | selected, Threshold(self.lowest, self.ties - int(selected.sum()))


def threshold(scores: Callable[[], Iterable[Float[Tensor, "..."]]], count: int) -> Threshold:
    """Return the threshold that keeps the `count` highest scores of all tensors together.

    `scores` returns an iterator over the tensors and is called twice, so that one tensor is in memory at a
    time. Scores are fp32, not negative and not NaN: the order of such numbers is that of their bits, read
    as integers. The first pass counts the upper 16 bits, the second the lower 16 bits of the scores whose
    upper bits are those of the threshold.
    """
    upper, above_upper = _bin_of(_histogram(scores(), lambda bits: bits >> 16), count)
    lower, above_lower = _bin_of(
        _histogram(scores(), lambda bits: bits[bits >> 16 == upper] & 0xFFFF), count - above_upper
    )
    lowest = torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32)
    return Threshold(lowest.item(), count - above_upper - above_lower)


def _histogram(scores: Iterable[Tensor], bin_of: Callable[[Tensor], Tensor]) -> Int[Tensor, "65536"]:
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for tensor in scores:
        # + 0.0 turns -0.0 into 0.0, whose bits are 0.
        total += torch.bincount(bin_of((tensor.flatten() + 0.0).view(torch.int32)), minlength=1 << 16).cpu()
    return total


def _bin_of(histogram: Int[Tensor, "65536"], count: int) -> tuple[int, int]:
    """Return the bin of the `count`th highest score, and the number of scores in higher bins."""
    from_above = histogram.flip(0).cumsum(dim=0)
    higher_bins = int((from_above < count).sum())
    above = 0
    if higher_bins:
        above = int(from_above[higher_bins - 1])
    return len(histogram) - 1 - higher_bins, above
