"""prune_hidden: narrow the residual stream by rotating it and removing its weakest directions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.families import Family, Task
from jobs.models.layers import check_finite, linear_of
from jobs.models.layout import Layout, LinearSpec, TensorSpec
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.techniques.prune_ffn import kept_width


@dataclass(frozen=True)
class PruneHidden(Technique):
    """Removes the share `ratio` of the hidden width: the directions in which the residual stream has least energy.

    If a norm stands before each reader of the residual stream, the model is invariant to rotations of the
    stream, once the weights of the norms are folded into the readers (Ashkboos et al. 2024, section 3). Where we
    depart from the paper: it uses one rotation per block, and so needs matrices on the skip connections. We use
    one rotation for all blocks, the principal axes of the normalised hidden states at all norms together, so the
    result is a plain, narrower model of the same architecture.

    A LayerNorm also subtracts the mean. One direction of the new width is given up to keep that mean at zero, so
    that the norm remains a LayerNorm; its bias becomes biases of its readers. The output head can no longer be
    the embedding's weight: if they were tied, the file gains a matrix.
    """

    kind: ClassVar[Kind] = "width"
    paper: ClassVar[str] = "Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    ratio: float = knob(0.1, Range(0.0, 0.7), "share of the hidden width to remove")

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        if family.norms == "after":
            return "its norms stand in the residual stream, which therefore cannot be rotated"
        if family.norms == "around":
            return "its norms after each layer fix the axes of the residual stream"
        return None

    @property
    def is_noop(self) -> bool:
        return self.ratio == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        stream = ResidualStream(layout)
        width = kept_width(stream.width, self.ratio)
        if width == stream.width:
            return layout
        tensors, linears, tables = dict(layout.others), dict(layout.linears), dict(layout.tables)
        for name in stream.tables:
            if name in tables:
                tables[name] = dataclasses.replace(tables[name], in_features=width)
            else:
                tensors[f"{name}.weight"] = TensorSpec("BF16", (tensors[f"{name}.weight"].shape[0], width))
        for norm, readers in stream.norms.items():
            tensors[f"{norm}.weight"] = TensorSpec("BF16", (width,))
            centred = f"{norm}.bias" in tensors
            if centred:
                tensors[f"{norm}.bias"] = TensorSpec("BF16", (width,))
            for reader in readers:
                if reader in linears:
                    old = linears[reader]
                    linears[reader] = dataclasses.replace(old, in_features=width, bias=old.bias or centred)
        bias = stream.head_bias or f"{stream.final_norm}.bias" in tensors
        head = LinearSpec(stream.outputs, width, bias)
        if layout.task == "causal-lm":
            tensors.pop(f"{stream.head}.bias", None)  # that of a tied head
            tables[stream.head] = head
        else:
            tensors |= {f"{stream.head}.{part}": tensor for part, tensor in head.tensors().items()}
        for writer in stream.writers:
            linears[writer] = dataclasses.replace(linears[writer], out_features=width)
        return dataclasses.replace(layout, linears=linears, others=tensors, tables=tables)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        if self.output_layout(layout) == layout:
            return model
        assert context.calibration is not None
        stream = ResidualStream(layout)
        for name in (*layout.linears, stream.head):
            check_finite(model.module.get_submodule(name).get_parameter("weight"), self.name(), name)
        gram = context.statistics.residual_gram(
            model, list(stream.norms), context.calibration, context.report
        )
        centred = isinstance(model.module.get_submodule(next(iter(stream.norms))), nn.LayerNorm)
        basis = axes(gram.to(model.device), kept_width(stream.width, self.ratio), centred)
        rotate(model, stream, basis)
        return model


class ResidualStream:
    """The modules that read or write the residual stream, by full names.

    tables: the embeddings. writers: the linears that add to the stream. norms: each norm, with the linears that
    read it. outputs: the number of outputs of the head. width: of the stream.
    """

    def __init__(self, layout: Layout) -> None:
        """Raise ValueError if a norm is missing, a table is packed, or the widths of the embeddings differ."""
        family = layout.family
        prefix = layout.blocks.removesuffix(family.blocks)
        self.tables = [prefix + name for name in family.tables]
        self.head = "score"
        if layout.task == "causal-lm":
            self.head = "lm_head"
        self.final_norm = prefix + family.final_norm
        if f"{self.final_norm}.weight" not in layout.others:
            raise ValueError(
                f"prune_hidden needs a norm before each layer and at the end: this {family.name} has no "
                f"{self.final_norm}"
            )
        self.norms: dict[str, list[str]] = {}
        self.writers: list[str] = []
        writing_paths = [family.attention.out]
        writing_paths += [feed_forward.out for feed_forward in family.feed_forwards]
        for block in range(layout.depth):
            for norm, readers in family.reads.items():
                self.norms[layout.name(block, norm)] = [layout.name(block, path) for path in readers]
            self.writers += [layout.name(block, path) for path in writing_paths]
        self.norms[self.final_norm] = [self.head]
        tensors = layout.tensors()
        for name in (*self.tables, self.head):
            if f"{name}.packed" in tensors:
                raise ValueError(
                    f"prune_hidden cannot rotate {name}, which is packed; put it before quantization"
                )
        widths = {tensors[f"{name}.weight"].shape[1] for name in self.tables}
        self.width = layout.others[f"{self.final_norm}.weight"].shape[0]
        if widths != {self.width}:
            raise ValueError(
                f"prune_hidden: the embeddings are {sorted(widths)} wide and the blocks {self.width}; "
                f"only equal widths can be rotated together"
            )
        head = tensors.get(f"{self.head}.weight", tensors[f"{self.tables[0]}.weight"])
        self.outputs, self.head_bias = head.shape[0], f"{self.head}.bias" in tensors


def axes(gram: Float[Tensor, "width width"], rank: int, centred: bool) -> Float[Tensor, "width rank"]:
    """Return the T that maps a hidden state x to the coordinates Tᵀx, with T Tᵀ x nearest to x.

    With `centred`, for LayerNorms, the columns of T span rank − 1 principal axes of the centred states, arranged
    so that the coordinates of any Tᵀx sum up to zero.
    """
    gram64 = gram.double()
    if not centred:
        return cast(Tensor, torch.linalg.eigh(gram64).eigenvectors).flip(-1)[:, :rank].contiguous()
    mean = torch.full_like(gram64, 1 / len(gram64))
    centring = torch.eye(len(gram64), dtype=gram64.dtype, device=gram64.device) - mean
    vectors = torch.linalg.eigh(centring @ gram64 @ centring).eigenvectors.flip(-1)[:, : rank - 1]
    vectors = cast(Tensor, torch.linalg.qr(centring @ vectors).Q)
    ones = torch.ones(rank, 1, dtype=gram64.dtype, device=gram64.device)
    unit = torch.eye(rank, dtype=gram64.dtype, device=gram64.device)
    plane = cast(Tensor, torch.linalg.qr(torch.cat([ones, unit], 1)).Q)
    return vectors @ plane[:, 1:rank].T


def rotate(model: Model, stream: ResidualStream, basis: Float[Tensor, "width rank"]) -> None:
    """Change the model's residual stream from x to basisᵀ x, in place."""
    width, rank = basis.shape
    basis = basis.to(model.device)
    # A tied head is the embedding's own tensor, which is replaced before the head.
    head_weight = cast(nn.Linear, model.module.get_submodule(stream.head)).weight.detach()
    _rotate_tables(model, stream, basis)
    _rotate_writers(model, stream, basis)
    # √width x/‖x‖ becomes √rank x'/‖x'‖, which is smaller. The norm's weight makes up for it in bf16; the readers
    # make up for the rounding of that weight.
    ratio = math.sqrt(width / rank)
    norm_weight = torch.full((rank,), ratio, dtype=DTYPE, device=basis.device)
    correction = ratio / norm_weight[0].item()
    for norm, readers in stream.norms.items():
        with on_device(model, norm, *readers):
            part: Any = model.module.get_submodule(norm)
            scale = part.weight.detach().double()
            shift = None
            if getattr(part, "bias", None) is not None:
                shift = part.bias.detach().double()
            for reader in readers:
                layer = cast(nn.Linear, model.module.get_submodule(reader))
                weight = layer.weight.detach()
                if reader == stream.head:
                    weight = head_weight
                weight = weight.to(basis)
                bias = _bias64(layer)
                if shift is not None:
                    bias = _sum(weight @ shift, bias)
                model.replace(reader, _linear((weight * scale) @ basis * correction, bias))
            part.weight = _parameter(norm_weight.clone())
            if shift is not None:
                part.bias = _parameter(torch.zeros(rank, device=basis.device))
                part.normalized_shape = (rank,)
    cast(Any, model.config).tie_word_embeddings = False


def _rotate_tables(model: Model, stream: ResidualStream, basis: Float[Tensor, "width rank"]) -> None:
    for name in stream.tables:
        with on_device(model, name, stream.head):
            table: Any = model.module.get_submodule(name)
            table.weight = _parameter(table.weight.detach().double() @ basis)
            table.embedding_dim = basis.shape[1]


def _rotate_writers(model: Model, stream: ResidualStream, basis: Float[Tensor, "width rank"]) -> None:
    for writer in stream.writers:
        with on_device(model, writer):
            layer = cast(nn.Linear, model.module.get_submodule(writer))
            bias = _bias64(layer)
            if bias is not None:
                bias = basis.T @ bias
            model.replace(writer, _linear(basis.T @ layer.weight.double(), bias))


def _bias64(layer: nn.Linear) -> Float[Tensor, " out"] | None:
    bias = cast("Tensor | None", layer.bias)
    if bias is None:
        return None
    return bias.double()


def _sum(first: Tensor, second: Tensor | None) -> Tensor:
    if second is None:
        return first
    return first + second


def _linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    return linear_of(weight.to(DTYPE), bias)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(DTYPE), requires_grad=False)
