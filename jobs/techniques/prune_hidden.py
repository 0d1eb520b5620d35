"""prune_hidden: a narrower residual stream, rotated so that what is cut off holds least."""

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
    """Removes the share `ratio` of the hidden width: the directions in which the residual stream has least
    energy.

    Norms before each reader make a model invariant to rotations of its residual stream, once their weights
    stand in the readers (Ashkboos et al. 2024, section 3). We take one rotation for all blocks, the principal
    axes of the normalised hidden states at all norms together, where the paper takes one a block: so no
    matrices have to stand on the skip connections, and what comes out is a plain, narrower model of the same
    architecture. A LayerNorm also subtracts the mean. One direction of the new width is given up to keep that
    mean at zero, so that it stays a LayerNorm. What it adds becomes biases of its readers.
    The output head can no longer be the embedding: where they were tied, the file gains a matrix.
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
        parts = Parts(layout)
        width = kept_width(parts.width, self.ratio)
        if width == parts.width:
            return layout
        others, linears, tables = dict(layout.others), dict(layout.linears), dict(layout.tables)
        for name in parts.tables:
            if name in tables:
                tables[name] = dataclasses.replace(tables[name], in_features=width)
            else:
                others[f"{name}.weight"] = TensorSpec("BF16", (others[f"{name}.weight"].shape[0], width))
        for norm, readers in parts.norms.items():
            centred = f"{norm}.bias" in others
            for tensor in ("weight", "bias") if centred else ("weight",):
                others[f"{norm}.{tensor}"] = TensorSpec("BF16", (width,))
            for reader in readers:
                if reader in linears:
                    old = linears[reader]
                    linears[reader] = dataclasses.replace(old, in_features=width, bias=old.bias or centred)
        bias = parts.head_bias or f"{parts.final_norm}.bias" in others
        head = LinearSpec(parts.outputs, width, bias)
        if layout.task == "causal-lm":
            others.pop(f"{parts.head}.bias", None)  # a tied head's
            tables[parts.head] = head
        else:
            others |= {f"{parts.head}.{part}": tensor for part, tensor in head.tensors().items()}
        for writer in parts.writers:
            linears[writer] = dataclasses.replace(linears[writer], out_features=width)
        return dataclasses.replace(layout, linears=linears, others=others, tables=tables)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        if self.output_layout(layout) == layout:
            return model
        assert context.calibration is not None
        parts = Parts(layout)
        for name in (*layout.linears, parts.head):
            check_finite(model.module.get_submodule(name).get_parameter("weight"), self.name(), name)
        stream = context.statistics.residual_gram(
            model, list(parts.norms), context.calibration, context.report
        )
        centred = isinstance(model.module.get_submodule(next(iter(parts.norms))), nn.LayerNorm)
        basis = axes(stream.to(model.device), kept_width(parts.width, self.ratio), centred)
        rotate(model, parts, basis)
        return model


class Parts:
    """What reads and what writes the residual stream, by full names."""

    def __init__(self, layout: Layout) -> None:
        family = layout.family
        prefix = layout.blocks.removesuffix(family.blocks)
        self.tables = [prefix + name for name in family.tables]
        self.head = "lm_head" if layout.task == "causal-lm" else "score"
        self.final_norm = prefix + family.final_norm
        if f"{self.final_norm}.weight" not in layout.others:
            raise ValueError(
                f"prune_hidden needs a norm before each layer and at the end: this {family.name} has no "
                f"{self.final_norm}"
            )
        self.norms = {
            layout.name(block, norm): [layout.name(block, path) for path in readers]
            for block in range(layout.depth)
            for norm, readers in family.reads.items()
        }
        self.norms[self.final_norm] = [self.head]
        self.writers = [
            layout.name(block, path)
            for block in range(layout.depth)
            for path in (family.attention.out, *(one.out for one in family.feed_forwards))
        ]
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


def axes(gram: Float[Tensor, "width width"], kept: int, centred: bool) -> Float[Tensor, "width kept"]:
    """The T that takes a hidden state x to Tᵀx of `kept` coordinates, and T Tᵀ x nearest to x.

    centred: for LayerNorms. T's columns then span kept − 1 principal axes of the centred states, arranged so
    that the coordinates of any Tᵀx sum to zero.
    """
    wide = gram.double()
    if not centred:
        return cast(Tensor, torch.linalg.eigh(wide).eigenvectors).flip(-1)[:, :kept].contiguous()
    mean = torch.full_like(wide, 1 / len(wide))
    centring = torch.eye(len(wide), dtype=wide.dtype, device=wide.device) - mean
    vectors = torch.linalg.eigh(centring @ wide @ centring).eigenvectors.flip(-1)[:, : kept - 1]
    vectors = cast(Tensor, torch.linalg.qr(centring @ vectors).Q)
    ones = torch.ones(kept, 1, dtype=wide.dtype, device=wide.device)
    unit = torch.eye(kept, dtype=wide.dtype, device=wide.device)
    plane = cast(Tensor, torch.linalg.qr(torch.cat([ones, unit], 1)).Q)
    return vectors @ plane[:, 1:kept].T


def rotate(model: Model, parts: Parts, basis: Float[Tensor, "width kept"]) -> None:
    """Write the model's residual stream x as basisᵀ x, in place."""
    module = model.module
    width, kept = basis.shape
    basis = basis.to(model.device)
    head: Any = module.get_submodule(parts.head)
    # A tied head is the embedding's own tensor, which is replaced below.
    head_weight = head.weight.detach()
    for name in parts.tables:
        with on_device(model, name, parts.head):
            table: Any = module.get_submodule(name)
            table.weight = _parameter(table.weight.detach().double() @ basis)
            table.embedding_dim = kept
    for writer in parts.writers:
        with on_device(model, writer):
            layer = cast(nn.Linear, module.get_submodule(writer))
            bias = None if layer.bias is None else basis.T @ layer.bias.double()
            model.replace(writer, _linear(basis.T @ layer.weight.double(), bias))
    # √width x/‖x‖ becomes √kept x'/‖x'‖, which is smaller; what bf16 rounds off goes to the readers.
    wider = math.sqrt(width / kept)
    held = torch.full((kept,), wider, dtype=DTYPE, device=basis.device)
    left = wider / held[0].item()
    for norm, readers in parts.norms.items():
        with on_device(model, norm, *readers):
            part: Any = module.get_submodule(norm)
            scale = part.weight.detach().double()
            shift = part.bias.detach().double() if getattr(part, "bias", None) is not None else None
            for reader in readers:
                layer = cast(nn.Linear, module.get_submodule(reader))
                weight = (head_weight if reader == parts.head else layer.weight.detach()).to(basis)
                bias = None if layer.bias is None else layer.bias.double()
                if shift is not None:
                    bias = weight @ shift + (0 if bias is None else bias)
                model.replace(reader, _linear((weight * scale) @ basis * left, bias))
            part.weight = _parameter(held.clone())
            if shift is not None:
                part.bias = _parameter(torch.zeros(kept, device=basis.device))
                part.normalized_shape = (kept,)
    cast(Any, model.config).tie_word_embeddings = False


def _linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    return linear_of(weight.to(DTYPE), bias)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(DTYPE), requires_grad=False)
