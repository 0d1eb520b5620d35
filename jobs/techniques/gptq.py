"""gptq: round the weights one input after the other, each time mending with those still to come."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.calibration.cache import Part
from jobs.calibration.hessian import inverse_factor
from jobs.compression import grids, packing
from jobs.context import Context
from jobs.knobs import Choice, Range, knob, sequential_knob
from jobs.models.layers import PackedLinear, check_finite
from jobs.models.layout import Form, Layout, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique

_BLOCK = 32
"""Inputs treated between two updates of all later ones. It divides every group size, so that a group's
weights are up to date when its grid is fitted; smaller than the paper's 128, which is faster here."""


@dataclass(frozen=True)
class Gptq(Technique):
    """Rounds the weights of the blocks so that the outputs on calibration text change least.

    The inputs' Gram matrix is that of the parent, so that one pass over the calibration text serves every bit
    width, group and order, of all candidates with this parent; or, where `sequential`, that of inputs which
    the blocks before give once they are rounded, as in the paper's code.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    order: str = knob(
        "activation", Choice(("natural", "activation")), "which input first: as stored, or the strongest"
    )
    clip: bool = knob(
        True, Choice((False, True)), "narrow a grid where clipping outliers lowers the error on the text"
    )
    damping: float = knob(
        0.01, Range(1e-4, 1.0, log=True), "share of the mean diagonal added to the diagonal"
    )
    sequential: bool = sequential_knob()

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, self.symmetric)

    def output_layout(self, layout: Layout) -> Layout:
        return packing.output_layout(self, layout)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        steps = self.for_linears(model.layout())
        if self.sequential:
            for names, gram in _inputs(model, context, sequential=True):
                weights = _weights(model, names)
                for step in dict.fromkeys(steps[name] for name in names):
                    alike = [name for name in names if steps[name] == step]
                    for name, packed in _rounded(model, alike, gram, step).items():
                        model.replace(name, packed)
                        packing.correct(model, name, weights[name].float(), gram, step)
        else:
            _assemble(model, context, steps)
        packing.pack_tables(model, self)
        return model

    @property
    def level(self) -> str:
        """What a level of these options is kept as: those that rounding one linear depends on, as a digest."""
        others = ("embedding_bits", "correction_rank", "sequential")
        decide = {name: value for name, value in self.options().items() if name not in others}
        text = json.dumps([self.version, decide], sort_keys=True)
        return f"gptq-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _assemble(model: Model, context: Context, steps: Mapping[str, Gptq]) -> None:
    """Put in the place of each linear what it is on the level that its step asks for.

    A level is all linears rounded with the same options. It depends on the parent and its Gram matrices alone, so
    it is made once, and kept with them for every candidate that takes some of its blocks, or all.
    """
    levels = {
        level: context.statistics.streamed(level, lambda step=step: _level(model, context, step))  # type: ignore[misc]
        for level, step in {step.level: step for step in steps.values()}.items()
    }
    assert context.calibration is not None
    for name, step in steps.items():
        weight = _weights(model, [name])[name]
        packing.replace_packed(model, name, levels[step.level], step.packing)
        if step.correction_rank:
            grams = context.statistics.grams(model, context.calibration, context.report)
            with on_device(model, name):
                gram = grams.gram(name).to(model.device)
                packing.correct(model, name, weight.to(model.device).float(), gram, step)


def _level(model: Model, context: Context, step: Gptq) -> Iterator[Part]:
    """The tensors of every linear as `step` rounds it, block by block; the model stays as it is."""
    layout = model.layout()
    by_block = itertools.groupby(
        _inputs(model, context, sequential=False), lambda read: layout.block_of(read[0][0])
    )
    for _, inputs in by_block:
        tensors: dict[str, Tensor] = {}
        for names, gram in inputs:
            for name, packed in _rounded(model, names, gram, step).items():
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.named_buffers()}
        yield tensors, {}


def _inputs(
    model: Model, context: Context, sequential: bool
) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "in in"]]]:
    assert context.calibration is not None
    return context.statistics.inputs(model, context.calibration, context.report, sequential)


def _weights(model: Model, names: Sequence[str]) -> dict[str, Float[Tensor, "out in"]]:
    return {name: cast(Tensor, model.module.get_submodule(name).weight).detach() for name in names}


def _rounded(
    model: Model, names: Sequence[str], gram: Float[Tensor, "in in"], step: Gptq
) -> dict[str, PackedLinear]:
    """The packed linears that stand for those of these names, which read the same input. So they have the same
    Hessian, and are rounded as one of more rows."""
    weights = [check_finite(weight, step.name(), name) for name, weight in _weights(model, names).items()]
    integers, grid = quantize(torch.cat(weights).float(), gram, step)
    found, start = {}, 0
    for name, weight in zip(names, weights, strict=True):
        rows = slice(start, start + len(weight))
        start = rows.stop
        own = grids.Grid(grid.scales[rows], grid.zeros[rows], grid.bits)
        found[name] = packing.packed_linear(model, name, integers[rows], own, step.packing)
    return found


def quantize(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], options: Gptq
) -> tuple[Float[Tensor, "out in"], grids.Grid]:
    """The integers and their grid that stand for `weight` (Frantar et al. 2022, algorithm 1).

    In natural order a group's grid is fitted when its first input is reached, to the weights as mended
    until then. In the order of activation groups are met in pieces, so all grids are fitted at the start.
    """
    packing = options.packing
    in_features = weight.shape[1]
    group = packing.group or in_features
    unused = gram.diagonal() == 0
    # What is never read may be rounded to anything: zero mends nothing and widens no grid.
    weight = torch.where(unused, 0, weight)
    natural = options.order == "natural"
    order = (
        torch.arange(in_features, device=gram.device)
        if natural
        else torch.argsort(gram.diagonal(), descending=True, stable=True)
    )
    factor = inverse_factor(gram[order][:, order], options.damping, options.name())
    # What a column's error costs, were it not mended: the energy of its input.
    costs = grids.grouped(gram.diagonal().unsqueeze(0), packing)[0] if options.clip else None
    grid = grids.fit(grids.grouped(weight, packing), packing, costs)
    # Transposed: one input's weights lie in a row, and all updates are of whole rows.
    columns = weight.T[order].contiguous()
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
    integers = torch.empty_like(columns)
    errors = torch.empty(_BLOCK, weight.shape[0], device=weight.device)
    top = 2**packing.bits - 1
    groups = (order // group).tolist()
    spread = factor.diagonal().tolist()  # at once: on a GPU each look at a number waits for all before it
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        if natural and packing.group and start % group == 0:
            fresh = columns[start : min(start + group, in_features)].T
            cost = None if costs is None else costs[start // group : start // group + 1, : fresh.shape[1]]
            refit = grids.fit(fresh.unsqueeze(1), packing, cost)
            scales[start // group] = refit.scales[:, 0]
            zeros[start // group] = refit.zeros[:, 0]
        for index in range(start, stop):
            column, scale, zero = columns[index], scales[groups[index]], zeros[groups[index]]
            whole = integers[index]
            torch.div(column, scale, out=whole).round_().add_(zero).clamp_(0, top)
            error = errors[index - start]
            torch.sub(whole, zero, out=error).mul_(scale).sub_(column).mul_(1 / spread[index])
            # error is (q − w)/U_ii, so the mending adds.
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error)
        if stop < in_features:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start])
    restored = torch.empty_like(integers)
    restored[order] = integers
    return restored.T, grids.Grid(scales.T, zeros.T, packing.bits)
