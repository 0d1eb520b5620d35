"""Packing: round linears and embeddings to few bits: shared options, the layout change, packed layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
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

OPTIONS_BY_LINEAR = frozenset({"bits", "correction_rank"})
"""The options that may differ by linear, in techniques that pack each linear independently."""
_ROWS = 4096
"""Rows of an embedding to round at once: a whole vocabulary in fp32 would fill memory."""
_UNPACKED_BITS = 16
"""The value of `embedding_bits` that leaves embedding and head in bf16."""


class PackingOptions(Protocol):
    """The options of a technique that packs every linear of the blocks.

    If options differ by linear, `packing` and `correction_rank` must be read from the step that `for_linears`
    returns for the linear.
    """

    @property
    def packing(self) -> Packing: ...
    @property
    def embedding_bits(self) -> int: ...
    @property
    def correction_rank(self) -> int | str: ...
    def name(self) -> str: ...
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
        "bits per weight of token embedding and head: 8 with a scale per row, 4 in groups; 16 leaves them in bf16",
    )


def correction_rank_knob() -> Any:
    return knob(
        0,
        Range(0, 4096, integer=True),
        "rank of the bf16 term that corrects the rounding error; 0 for no correction",
    )


@dataclass(frozen=True)
class Quantization:
    """The layout change of techniques that pack every linear (`jobs.technique.LayoutChange`)."""

    options: PackingOptions

    @property
    def is_noop(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return True

    def apply(self, layout: Layout, technique: str) -> Layout:
        """Return the layout with packed linears, their corrections, and packed embedding and head if asked for.

        Raises ValueError if the rank of a correction exceeds the smaller side of its linear. The thin linears
        of a factorization get no correction: they are of low rank themselves.
        """
        linears = {}
        steps = self.options.for_linears(layout)
        for name, spec in layout.linears.items():
            packed = spec.packed(steps[name].packing)
            rank = _rank(steps[name], name)
            if rank == 0:
                linears[name] = packed
                continue
            max_rank = min(spec.out_features, spec.in_features)
            if rank > max_rank:
                raise ValueError(
                    f"{technique}.correction_rank={rank} is outside [0, {max_rank}]: {name} is "
                    f"{spec.out_features} by {spec.in_features}"
                )
            linears[f"{name}.rounded"] = packed
            linears[f"{name}.v"] = LinearSpec(rank, spec.in_features, bias=False)
            linears[f"{name}.u"] = LinearSpec(spec.out_features, rank, bias=False)
        changed = dataclasses.replace(layout, linears=linears)
        if self.options.embedding_bits == _UNPACKED_BITS:
            return changed
        return changed.with_tables_packed(_table_packing(self.options, layout))


def pack_linear(
    model: Model,
    name: str,
    integers: Float[Tensor, "out in"],
    grid: grids.Grid,
    packing: Packing,
    input_scales: Float[Tensor, " in"] | None = None,
) -> None:
    """Replace the dense linear `name` by the packed linear of these integers and their grid."""
    model.replace(name, packed_linear(model, name, integers, grid, packing, input_scales))


def packed_linear(
    model: Model,
    name: str,
    integers: Float[Tensor, "out in"],
    grid: grids.Grid,
    packing: Packing,
    input_scales: Float[Tensor, " in"] | None = None,
) -> PackedLinear:
    """Return the packed linear of these integers and their grid, with the bias of the dense linear `name`."""
    bias = cast(nn.Linear, model.module.get_submodule(name)).bias
    zeros = grids.stored_zeros(grid, packing)
    return PackedLinear.of(integers, grid.scales, zeros, packing, bias, input_scales)


def replace_packed(model: Model, name: str, tensors: Mapping[str, Tensor], packing: Packing) -> None:
    """Replace the dense linear `name` by a packed one whose tensors are stored in `tensors` as `NAME.PART`."""
    dense = cast(nn.Linear, model.module.get_submodule(name))
    spec = dataclasses.replace(cast(LinearSpec, spec_of(dense)), packing=packing)
    layer = PackedLinear(spec, "cpu")
    for part, tensor in layer.named_buffers():
        tensor.copy_(tensors[f"{name}.{part}"])
    layer.bias = dense.bias
    model.replace(name, layer)


def correct(
    model: Model,
    name: str,
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None,
    step: PackingOptions,
) -> None:
    """Add a low-rank correction of rank `step.correction_rank` to the packed linear `name`.

    The correction is the best of its rank for the rounding error of `weight`, on inputs with this Gram matrix
    (Liu et al. 2024, EoRA, arXiv:2410.21271); if `gram` is None, on the weights alone (Zhang et al. 2024, LQER,
    arXiv:2402.02446).
    """
    rank = _rank(step, name)
    if rank:
        packed = cast(PackedLinear, model.module.get_submodule(name))
        u, v = best_factors(weight - packed.weight(), gram, rank)
        model.replace(
            name, CorrectedLinear(packed, linear_of(v.to(DTYPE), None), linear_of(u.to(DTYPE), None))
        )


def pack_tables(model: Model, step: PackingOptions) -> None:
    """Round token embedding and head, in place, to grids clipped to the least squared error of the weights.

    A head that is tied to the embedding stays tied. Does nothing if `step.embedding_bits` is 16.
    """
    if step.embedding_bits == _UNPACKED_BITS:
        return
    packing = _table_packing(step, model.layout())
    for name, table in model.tables().items():
        spec = dataclasses.replace(cast(LinearSpec, spec_of(table)), packing=packing)
        with on_device(model, name):
            weight = check_finite(cast(Tensor, table.weight).detach(), step.name(), name)
            if isinstance(table, nn.Embedding):
                embedding = PackedEmbedding(spec, table, weight.device)
                _round_rows(embedding, weight)
                model.replace_embedding(embedding)
            else:
                head = PackedLinear(spec, weight.device)
                _round_rows(head, weight)
                head.bias = cast(nn.Linear, table).bias
                model.replace(name, head)


def round_to_nearest(
    weight: Float[Tensor, "out in"],
    packing: Packing,
    importance: Float[Tensor, "groups columns"] | None = None,
) -> tuple[Float[Tensor, "out in"], grids.Grid]:
    """Return the integers nearest to a weight, and their grid (`grids.fit`)."""
    grouped = grids.grouped(weight, packing)
    grid = grids.fit(grouped, packing, importance)
    return grid.integers(grouped).flatten(1)[:, : weight.shape[1]], grid


def table_packing(bits: int, group: int, symmetric: bool) -> Packing:
    """Return the packing of embedding and head.

    With 8 bits one scale per row is fine enough, and runtimes multiply faster with it.
    """
    if bits == 8:
        group = 0
    return Packing(bits, group, symmetric)


def _table_packing(options: PackingOptions, layout: Layout) -> Packing:
    # Group and symmetry are the same for every linear; `packing` of an option that differs by linear is not.
    first = next(iter(options.for_linears(layout).values()))
    return table_packing(options.embedding_bits, first.packing.group, first.packing.symmetric)


def _rank(step: PackingOptions, name: str) -> int:
    """Return the rank of the correction of linear `name`; 0 for thin linears of a factorization."""
    if name.endswith((".u", ".v")):
        return 0
    return int(step.correction_rank)


def _round_rows(layer: PackedLinear | PackedEmbedding, weight: Float[Tensor, "out in"]) -> None:
    """Fill the tensors of `layer` with the rounded `weight`, some rows at a time."""
    packing = layer.packing
    importance = torch.ones_like(grids.grouped(weight[:1], packing)[0], dtype=torch.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        integers, grid = round_to_nearest(weight[rows].float(), packing, importance)
        zeros = grids.stored_zeros(grid, packing)
        rounded = PackedLinear.of(integers, grid.scales, zeros, packing, None)
        layer.packed[rows] = rounded.packed
        layer.scales[rows] = rounded.scales
        if not packing.symmetric:
            layer.zeros[rows] = rounded.zeros
