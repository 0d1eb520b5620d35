"""Sparsity: how many weights of a linear are kept, and which, by scores and a pattern."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jobs.models.layers import SparseLinear, check_finite
from jobs.models.layout import Layout
from jobs.models.model import DTYPE, Model
from jobs.technique import Technique

PATTERNS = ("unstructured", "2:4", "4:8")


@dataclass(frozen=True)
class Sparsity:
    """What share of each linear's weights goes.

    unstructured: floor(`share` · in) weights a row on average, so that the number of all, out · floor(…),
        follows from shapes alone; a linear too narrow to lose one stays dense.
    n:m (2:4, 4:8): n of each m neighbours in a row stay, whatever `share` is. The inputs of every linear
        must be a multiple of m.
    """

    share: float
    pattern: str = "unstructured"

    @property
    def is_noop(self) -> bool:
        return self.group is None and self.share == 0

    @property
    def group(self) -> int | None:
        """m of n:m; None where weights go anywhere."""
        return None if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])

    def removed(self, in_features: int) -> int:
        """How many of a row's weights go: in every row, or on average over rows."""
        # A share of 0.29 of 100 weights is 28.999999999999996 in binary.
        return in_features // 2 if self.group else math.floor(self.share * in_features + 1e-9)

    def output_layout(self, layout: Layout, technique: Technique) -> Layout:
        """The layout without what goes; ValueError names a linear whose width the pattern does not divide."""
        technique.check_forms(layout)
        changed = {}
        for name, spec in layout.linears.items():
            if self.group and spec.in_features % self.group:
                raise ValueError(
                    f"{technique.name()}.pattern={self.pattern}: {name} has {spec.in_features} inputs, which "
                    f"are not a multiple of {self.group}"
                )
            removed = self.removed(spec.in_features)
            if removed:
                kept = spec.out_features * (spec.in_features - removed)
                changed[name] = dataclasses.replace(spec, kept=kept)
        return layout.with_linears(changed)

    def of_rows(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The weights of highest score: equally many of each row, or n of each m neighbours."""
        out_features, in_features = scores.shape
        if self.group is None:
            return highest(scores, in_features - self.removed(in_features))
        neighbours = scores.reshape(out_features, -1, self.group)
        return highest(neighbours, self.group // 2).view(out_features, in_features)

    def of_whole(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The weights of highest score of the whole linear, or n of each m neighbours."""
        if self.group is not None:
            return self.of_rows(scores)
        out_features, in_features = scores.shape
        kept = out_features * (in_features - self.removed(in_features))
        return highest(scores.flatten(), kept).view(out_features, in_features)


def highest(scores: Float[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """Which are the `count` highest along the last dimension; of equal ones the first.

    Scores must not be NaN.
    """
    size = scores.shape[-1]
    if count == size:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.kthvalue(size - count + 1, dim=-1, keepdim=True).values
    above, equal = scores > least, scores == least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def dense_weight(layer: nn.Module, technique: str, name: str) -> Float[Tensor, "out in"]:
    """The weight of a dense linear, in fp32; ValueError where it is not finite."""
    return check_finite(layer.get_parameter("weight").detach(), technique, name).float()


def keep(model: Model, name: str, weight: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"]) -> None:
    """Put a sparse linear in the place of the dense one of this full name: of `weight`, where `kept` is true."""
    layer = cast(nn.Linear, model.module.get_submodule(name))
    model.replace(name, SparseLinear.of(weight.to(DTYPE), kept, layer.bias))


@dataclass(frozen=True)
class Cut:
    """The lowest score that is kept of several tensors' scores, and how many that have just it."""

    least: float
    room: int

    def of(self, scores: Float[Tensor, "..."]) -> tuple[Bool[Tensor, "..."], Cut]:
        """What is kept of one tensor's scores, of equal ones the first, and the cut for the tensors after it."""
        equal = scores == self.least
        taken = equal & (equal.flatten().cumsum(dim=0).view(equal.shape) <= self.room)
        return (scores > self.least) | taken, Cut(self.least, self.room - int(taken.sum()))


def cut(scores: Callable[[], Iterable[Float[Tensor, "..."]]], count: int) -> Cut:
    """The cut that keeps the `count` highest scores of all tensors together.

    `scores` gives the tensors one by one, anew at each of two calls: only one is held at a time. They are
    fp32, not negative and not NaN, so that they rise as their bits do, read as an integer: the first pass
    counts the upper 16 bits, the second the lower ones of those whose upper ones are at the cut.
    """
    upper, above = _bin_of(_histogram(scores(), lambda bits: bits >> 16), count)
    lower, higher = _bin_of(
        _histogram(scores(), lambda bits: bits[bits >> 16 == upper] & 0xFFFF), count - above
    )
    least = torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32)
    return Cut(least.item(), count - above - higher)


def _histogram(scores: Iterable[Tensor], bin_of: Callable[[Tensor], Tensor]) -> Int[Tensor, "65536"]:
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for one in scores:
        # + 0.0 makes the zero whose sign bit is set the other one.
        total += torch.bincount(bin_of((one.flatten() + 0.0).view(torch.int32)), minlength=1 << 16).cpu()
    return total


def _bin_of(histogram: Int[Tensor, "65536"], count: int) -> tuple[int, int]:
    """The bin that holds the one that is `count`th from above, and how many lie above that bin."""
    from_above = histogram.flip(0).cumsum(dim=0)
    place = int((from_above < count).sum())
    above = int(from_above[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
