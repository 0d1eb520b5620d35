"""Packing: what the techniques that round weights to few bits share: their options, their outline, what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import grids
from jobs.compression.low_rank import best_factors
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import (
    CorrectedLinear,
    PackedEmbedding,
    PackedLinear,
    check_finite,
    linear_of,
    spec_of,
)
from jobs.models.layout import Layout, LinearSpec, Packing
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device

BY_LINEAR = frozenset({"bits", "correction_rank"})
"""What may differ by linear where each is packed by itself."""
_ROWS = 4096
"""Rows of an embedding that are rounded at once: in fp32, a vocabulary of them would fill memory."""


class PackingOptions(Protocol):
    """A technique that packs every linear of the blocks. Where options differ by block, `packing` and
    `correction_rank` are those of the step that `for_linears` gives for a linear."""

    @property
    def packing(self) -> Packing: ...
    @property
    def embedding_bits(self) -> int: ...
    @property
    def correction_rank(self) -> int | str: ...
    def name(self) -> str: ...
    def check_forms(self, layout: Layout) -> None: ...
    def for_linears(self, layout: Layout) -> dict[str, Self]: ...


def bits_knob(default: int) -> Any:
    return knob(default, Choice((2, 3, 4, 8)), "bits per weight")


def group_knob() -> Any:
    return knob(64, Choice((0, 32, 64, 128)), "weights of a row that share a scale; 0 for the whole row")


def symmetric_knob() -> Any:
    return knob(False, Choice((False, True)), "grids centred on zero, without zero points")


def embedding_bits_knob() -> Any:
    return knob(
        16,
        Choice((16, 8, 4)),
        "bits per weight of token embedding and head: 8 with a scale a row, 4 in groups; 16 leaves them as they are",
    )


def correction_rank_knob() -> Any:
    return knob(
        0, Range(0, 4096, integer=True), "rank of the bf16 term that mends the rounding error; 0 for none"
    )


def output_layout(step: PackingOptions, layout: Layout) -> Layout:
    """The layout after a step that packs; ValueError where it cannot be applied.

    Thin linears of a factorization get no correction: they are of low rank themselves.
    """
    step.check_forms(layout)
    linears = {}
    steps = step.for_linears(layout)
    for name, spec in layout.linears.items():
        packed = spec.packed(steps[name].packing)
        rank = _rank(steps[name], name)
        if rank == 0:
            linears[name] = packed
            continue
        limit = min(spec.out_features, spec.in_features)
        if rank > limit:
            raise ValueError(
                f"{step.name()}.correction_rank={rank} is outside [0, {limit}]: {name} is "
                f"{spec.out_features} by {spec.in_features}"
            )
        linears[f"{name}.rounded"] = packed
        linears[f"{name}.v"] = LinearSpec(rank, spec.in_features, bias=False)
        linears[f"{name}.u"] = LinearSpec(spec.out_features, rank, bias=False)
    changed = dataclasses.replace(layout, linears=linears)
    if step.embedding_bits == 16:
        return changed
    return changed.with_tables_packed(_table_packing(step, next(iter(steps.values()))))


def pack_linear(
    model: Model,
    name: str,
    integers: Float[Tensor, "out in"],
    grid: grids.Grid,
    packing: Packing,
    input_scales: Float[Tensor, " in"] | None = None,
) -> None:
    """Put the packed linear of these integers and their grid in the place of the dense one of this full name."""
    model.replace(name, packed_linear(model, name, integers, grid, packing, input_scales))


def packed_linear(
    model: Model,
    name: str,
    integers: Float[Tensor, "out in"],
    grid: grids.Grid,
    packing: Packing,
    input_scales: Float[Tensor, " in"] | None = None,
) -> PackedLinear:
    """The packed linear of these integers and their grid, with the bias of the dense one of this full name."""
    bias = cast(nn.Linear, model.module.get_submodule(name)).bias
    zeros = grids.stored_zeros(grid, packing)
    return PackedLinear.of(integers, grid.scales, zeros, packing, bias, input_scales)


def replace_packed(model: Model, name: str, held: Mapping[str, Tensor], packing: Packing) -> None:
    """Put a packed linear in the place of the dense one of this full name; `held` has its tensors as `NAME.PART`."""
    dense = cast(nn.Linear, model.module.get_submodule(name))
    spec = dataclasses.replace(cast(LinearSpec, spec_of(dense)), packing=packing)
    layer = PackedLinear(spec, "cpu")
    for part, tensor in layer.named_buffers():
        tensor.copy_(held[f"{name}.{part}"])
    layer.bias = dense.bias
    model.replace(name, layer)


def correct(
    model: Model,
    name: str,
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None,
    step: PackingOptions,
) -> None:
    """Mend the packed linear of this full name by two thin ones beside it, of the rank that `step` says.

    They are the best of their rank on what rounding took from `weight`, measured on inputs of this Gram
    matrix (Liu et al. 2024, EoRA, arXiv:2410.21271); without one, on the weights alone (Zhang et al. 2024,
    LQER, arXiv:2402.02446).
    """
    rank = _rank(step, name)
    if rank:
        packed = cast(PackedLinear, model.module.get_submodule(name))
        u, v = best_factors(weight - packed.weight(), gram, rank)
        thin = linear_of(v.to(DTYPE), None), linear_of(u.to(DTYPE), None)
        model.replace(name, CorrectedLinear(packed, *thin))


def pack_tables(model: Model, step: PackingOptions) -> None:
    """Round token embedding and head to the nearest values of grids that clip where the squared error of the
    weights gains by it. A head tied to the embedding stays tied."""
    if step.embedding_bits == 16:
        return
    packing = _table_packing(step, next(iter(step.for_linears(model.layout()).values())))
    for name, table in model.tables().items():
        spec = dataclasses.replace(cast(LinearSpec, spec_of(table)), packing=packing)
        with on_device(model, name):
            weight = check_finite(cast(Tensor, table.weight).detach(), step.name(), name)
            if isinstance(table, nn.Embedding):
                embedding = PackedEmbedding(spec, table, weight.device)
                _fill(embedding, weight)
                model.replace_embedding(embedding)
            else:
                head = PackedLinear(spec, weight.device)
                _fill(head, weight)
                head.bias = cast(nn.Linear, table).bias
                model.replace(name, head)


def round_to_nearest(
    weight: Float[Tensor, "out in"],
    packing: Packing,
    importance: Float[Tensor, "groups columns"] | None = None,
) -> tuple[Float[Tensor, "out in"], grids.Grid]:
    """The integers nearest to a weight, and the grid that `grids.fit` gives it."""
    grouped = grids.grouped(weight, packing)
    grid = grids.fit(grouped, packing, importance)
    return grid.integers(grouped).flatten(1)[:, : weight.shape[1]], grid


def _rank(step: PackingOptions, name: str) -> int:
    return 0 if name.endswith((".u", ".v")) else int(step.correction_rank)


def _table_packing(step: PackingOptions, some: PackingOptions) -> Packing:
    """some: the step as it treats some linear; but for the bits, it treats all alike."""
    return table_packing(step.embedding_bits, some.packing.group, some.packing.symmetric)


def table_packing(bits: int, group: int, symmetric: bool) -> Packing:
    """How tables are packed: 8 bits are fine enough for one scale a row, which runtimes multiply by faster."""
    return Packing(bits, 0 if bits == 8 else group, symmetric)


def _fill(layer: PackedLinear | PackedEmbedding, weight: Float[Tensor, "out in"]) -> None:
    packing = layer.packing
    equal = torch.ones_like(grids.grouped(weight[:1], packing)[0], dtype=torch.float32)
    for at in range(0, len(weight), _ROWS):
        rows = slice(at, at + _ROWS)
        integers, grid = round_to_nearest(weight[rows].float(), packing, equal)
        zeros = grids.stored_zeros(grid, packing)
        some = PackedLinear.of(integers, grid.scales, zeros, packing, None)
        layer.packed[rows] = some.packed
        layer.scales[rows] = some.scales
        if not packing.symmetric:
            layer.zeros[rows] = some.zeros
