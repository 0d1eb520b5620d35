"""gptq: round the weights input by input, and correct each error with the weights of later inputs."""

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
from jobs.compression.packing import Quantization
from jobs.context import Context
from jobs.knobs import Choice, Range, knob, sequential_knob
from jobs.models.layers import PackedLinear, check_finite
from jobs.models.layout import Form, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique

_BLOCK = 32
"""Inputs processed between two updates of all later inputs. It divides every group size, so that a group's
weights are up to date when its grid is fitted. Smaller than the paper's 128, which was slower here."""


@dataclass(frozen=True)
class Gptq(Technique):
    """Rounds the weights of the blocks so that the outputs on calibration text change least.

    Algorithm 1 of Frantar et al.: after each input is rounded, the error (w − ŵ)/[U]_jj is corrected with the
    weights of later inputs, U being the Cholesky factor of the inverse Hessian. The Hessian is the Gram matrix
    of the parent's inputs, so that one pass over the calibration text serves every bit width, group and order
    of all candidates with this parent. With `sequential` it is that of the outputs of already rounded blocks,
    as in the paper's code. Where we depart from the paper: `clip` narrows the grids.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    symmetric: bool = packing.symmetric_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    order: str = knob(
        "activation",
        Choice(("natural", "activation")),
        "order of the inputs: as stored, or the strongest first",
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

    @property
    def layout_change(self) -> Quantization:
        return Quantization(self)

    @property
    def cache_name(self) -> str:
        """The cache's name of linears rounded with these options: a digest of those that affect a single linear."""
        excluded = ("embedding_bits", "correction_rank", "sequential")
        options = {name: value for name, value in self.options().items() if name not in excluded}
        text = json.dumps([self.version, options], sort_keys=True)
        return f"gptq-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        steps = self.for_linears(model.layout())
        if self.sequential:
            _round_in_sequence(model, context, steps)
        else:
            _replace_by_cached(model, context, steps)
        packing.pack_tables(model, self)
        return model


def _round_in_sequence(model: Model, context: Context, steps: Mapping[str, Gptq]) -> None:
    """Round block by block, with the outputs of the rounded blocks before as inputs."""
    for names, gram in _inputs(model, context, sequential=True):
        weights = _weights(model, names)
        for step in dict.fromkeys(steps[name] for name in names):
            alike = [name for name in names if steps[name] == step]
            for name, packed in _rounded(model, alike, gram, step).items():
                model.replace(name, packed)
                packing.correct(model, name, weights[name].float(), gram, step)


def _replace_by_cached(model: Model, context: Context, steps: Mapping[str, Gptq]) -> None:
    """Replace each linear by its rounded version from the cache, which is filled first where it has none.

    The cache holds, for each set of options, all linears rounded with them. These depend on the parent and its
    Gram matrices alone, so they serve every candidate that uses some of them.
    """
    cached: dict[str, Mapping[str, Tensor]] = {}
    for step in steps.values():
        if step.cache_name not in cached:
            make = functools.partial(_round_all, model, context, step)
            cached[step.cache_name] = context.statistics.streamed(step.cache_name, make)
    assert context.calibration is not None
    for name, step in steps.items():
        weight = _weights(model, [name])[name]
        packing.replace_packed(model, name, cached[step.cache_name], step.packing)
        if step.correction_rank:
            grams = context.statistics.grams(model, context.calibration, context.report)
            with on_device(model, name):
                gram = grams.gram(name).to(model.device)
                packing.correct(model, name, weight.to(model.device).float(), gram, step)


def _round_all(model: Model, context: Context, step: Gptq) -> Iterator[Part]:
    """Yield, block by block, the tensors of every linear as `step` rounds it; `model` is not changed."""
    layout = model.layout()
    by_block = itertools.groupby(
        _inputs(model, context, sequential=False),
        lambda names_and_gram: layout.block_of(names_and_gram[0][0]),
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
    """Return the packed linears for these names, which read the same input.

    They have the same Hessian, so they are rounded as one linear with more rows.
    """
    weights = [check_finite(weight, step.name(), name) for name, weight in _weights(model, names).items()]
    integers, grid = quantize(torch.cat(weights).float(), gram, step)
    linears, start = {}, 0
    for name, weight in zip(names, weights, strict=True):
        rows = slice(start, start + len(weight))
        start = rows.stop
        part = grids.Grid(grid.scales[rows], grid.zeros[rows], grid.bits)
        linears[name] = packing.packed_linear(model, name, integers[rows], part, step.packing)
    return linears


def quantize(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], options: Gptq
) -> tuple[Float[Tensor, "out in"], grids.Grid]:
    """Return the integers that represent `weight`, and their grid (Frantar et al. 2022, algorithm 1).

    In natural order a group's grid is fitted when its first input is reached, to the weights as corrected
    until then. In the order of activations the inputs of a group are spread, so all grids are fitted first.
    """
    target = options.packing
    in_features = weight.shape[1]
    group = target.group or in_features
    unused = gram.diagonal() == 0
    # The weights of an input that is always zero may be rounded to anything: a zero corrects nothing and widens
    # no grid.
    weight = torch.where(unused, 0, weight)
    natural = options.order == "natural"
    if natural:
        order = torch.arange(in_features, device=gram.device)
    else:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], options.damping, options.name())
    importance = None
    if options.clip:
        # Without correction, the cost of a column's error is the energy of its input.
        importance = grids.grouped(gram.diagonal().unsqueeze(0), target)[0]
    grid = grids.fit(grids.grouped(weight, target), target, importance)
    # Transposed, so that the weights of one input are contiguous and all updates are of whole rows.
    columns = weight.T[order].contiguous()
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
    integers = torch.empty_like(columns)
    errors = torch.empty(_BLOCK, weight.shape[0], device=weight.device)
    top = 2**target.bits - 1
    groups = (order // group).tolist()
    diagonal = factor.diagonal().tolist()  # at once: each read of a GPU scalar waits for all work before it
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        if natural and target.group and start % group == 0:
            index = start // group
            current = columns[start : min(start + group, in_features)].T
            group_importance = None
            if importance is not None:
                group_importance = importance[index : index + 1, : current.shape[1]]
            refitted = grids.fit(current.unsqueeze(1), target, group_importance)
            scales[index] = refitted.scales[:, 0]
            zeros[index] = refitted.zeros[:, 0]
        for index in range(start, stop):
            column, scale, zero = columns[index], scales[groups[index]], zeros[groups[index]]
            rounded = integers[index]
            torch.div(column, scale, out=rounded).round_().add_(zero).clamp_(0, top)
            error = errors[index - start]
            torch.sub(rounded, zero, out=error).mul_(scale).sub_(column).mul_(1 / diagonal[index])
            # The error is (q − w)/U_ii, so the correction is added.
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error)
        if stop < in_features:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start])
    restored = torch.empty_like(integers)
    restored[order] = integers
    return restored.T, grids.Grid(scales.T, zeros.T, target.bits)
