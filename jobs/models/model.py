"""Model: a model in memory, where its parts are, and how it is given another layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.models.families import Family, Task, family
from jobs.models.layers import (
    CorrectedLinear,
    LowRankLinear,
    PackedEmbedding,
    PackedLinear,
    SparseLinear,
    TiedHead,
    linear_of,
    spec_of,
)
from jobs.models.layout import Layout, LinearSpec, TensorSpec

DTYPE = torch.bfloat16
"""What models are held and run in: 2 bytes a weight in memory as in the file (docs/decisions/bf16.md)."""

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
               torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip
"""As safetensors names them."""


@dataclass(frozen=True)
class Model:
    """A model in memory. `folder` is where its tokenizer and config came from.

    device: where it computes. It rests on the CPU; `jobs.models.placement` takes parts of it there and back.
    """

    module: nn.Module
    family: Family
    folder: Path
    device: str = "cpu"

    @property
    def task(self) -> Task:
        return task_of_config(self.config)

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        return _head_width(self.config)

    @property
    def base(self) -> nn.Module:
        """The model without a head: embeddings, blocks and final norm."""
        return cast(nn.Module, getattr(self.module, _base_name(self.module), self.module))

    @property
    def base_prefix(self) -> str:
        """What stands before the full names of the base model's parts: nothing where it is the whole."""
        return "" if self.base is self.module else f"{_base_name(self.module)}."

    @property
    def blocks_name(self) -> str:
        """The full name of the list of blocks."""
        return self.base_prefix + self.family.blocks

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.blocks_name))

    @property
    def config(self) -> Any:
        return self.module.config

    def answer(self, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch ..."]:
        """The logits, of every next token or of the classes; the last hidden states for an embedding."""
        said = self.module(rows, **({} if self.family.encoder else {"use_cache": False}))
        return cast(Tensor, said.last_hidden_state if self.task == "embedding" else said.logits)

    def linears(self) -> dict[str, nn.Module]:
        """Every linear inside the blocks (those that a factorization made too), by its full name."""
        prefix = self.blocks_name + "."
        return {
            name: module
            for name, module in self.module.named_modules()
            if name.startswith(prefix) and spec_of(module) is not None
        }

    def tables(self) -> dict[str, nn.Module]:
        """The token embedding and the head, by their full names. A head that is tied to the embedding is no
        table of its own (see `tied_head`)."""
        module: Any = self.module
        found = {_name_in(module, module.get_input_embeddings()): module.get_input_embeddings()}
        head = module.get_output_embeddings()
        if head is not None and self.tied_head() is None:
            found[_name_in(module, head)] = head
        return found

    def tied_head(self) -> str | None:
        """The full name of a head whose weight is the token embedding's."""
        module: Any = self.module
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        tied = isinstance(head, TiedHead) or (
            isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
        )
        return _name_in(module, head) if tied else None

    def replace_embedding(self, embedding: nn.Module) -> None:
        """Put `embedding`, a plain or packed one, in the place of the token embedding; a tied head stays tied."""
        name, head = next(iter(self.tables())), self.tied_head()
        if head is not None:
            bias = self.module.get_submodule(head).bias
            tied: nn.Module
            if isinstance(embedding, PackedEmbedding):
                tied = TiedHead(embedding, cast(nn.Parameter | None, bias))
            else:
                tied = linear_of(cast(Tensor, embedding.weight), cast(Tensor | None, bias))
                tied.weight = cast(nn.Parameter, embedding.weight)
            self.replace(head, tied)
        self.replace(name, embedding)

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put `layer` in the place of the submodule of this full name."""
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, layer)

    def layout(self) -> Layout:
        """The layout of the file that `save` would write now."""
        specs = {name: cast(LinearSpec, spec_of(layer)) for name, layer in self.linears().items()}
        tables = {name: cast(LinearSpec, spec_of(table)) for name, table in self.tables().items()}
        held = {f"{name}.{part}" for name, spec in (specs | tables).items() for part in spec.tensors()}
        others = {
            name: TensorSpec(DTYPE_NAMES[written_dtype(tensor)], tuple(tensor.shape))
            for name, tensor in distinct_tensors(self.module).items()
            if name not in held
        }
        heads, keys = _heads(self.config)
        return Layout(
            self.family, self.task, self.blocks_name, self.head_width, heads // keys, specs, others,
            tables,
        )  # fmt: skip


def fit_heads(model: Model) -> None:
    """Tell each attention module how many heads its linears make, where it remembers their number."""
    attention = model.family.attention
    width = model.head_width
    for block in model.blocks:
        module: Any = block.get_submodule(attention.module)
        out = block.get_submodule(attention.out)
        first = out.v if isinstance(out, (LowRankLinear, CorrectedLinear)) else out
        rows = cast(LinearSpec, spec_of(first)).in_features
        for name, value in (
            *((name, rows // width) for name in ("num_heads", "num_attention_heads", "n_heads")),
            *((name, rows) for name in ("split_size", "all_head_size")),
        ):
            if hasattr(module, name):
                setattr(module, name, value)


def reshape(model: Model, layout: Layout) -> None:
    """Give an empty module the linears of `layout`, and other tensors of its shapes, still without weights."""
    linears = model.linears()
    for name, spec in layout.linears.items():
        parent, _, child = name.rpartition(".")
        if child == "rounded":
            model.replace(parent, CorrectedLinear(nn.Identity(), nn.Identity(), nn.Identity()))
        elif child == "v" and name not in linears and f"{parent}.rounded" not in layout.linears:
            model.replace(parent, LowRankLinear(nn.Identity(), nn.Identity()))
        if name in linears and spec_of(linears[name]) == spec:
            continue
        if spec.packing is not None:
            model.replace(name, PackedLinear(spec, "meta"))
        elif spec.kept is not None:
            model.replace(name, SparseLinear(spec, "meta"))
        else:
            model.replace(
                name,
                nn.Linear(spec.in_features, spec.out_features, spec.bias, device="meta", dtype=DTYPE),
            )
    for name, tensor in layout.others.items():
        _resize(model.module, name, tensor.shape)
    for name, table in model.tables().items():
        spec = layout.tables[name]
        if spec.packing is None:
            for part, tensor in spec.tensors().items():
                _resize(model.module, f"{name}.{part}", tensor.shape)
        elif isinstance(table, nn.Embedding):
            model.replace_embedding(PackedEmbedding(spec, table, "meta"))
        else:
            model.replace(name, PackedLinear(spec, "meta"))


def _resize(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a parameter of this full name another shape, if it has not that one already."""
    owner, _, child = name.rpartition(".")
    part: Any = module.get_submodule(owner)
    held = getattr(part, child)
    if held is None:  # a bias that a step has added
        held = torch.empty(0, dtype=DTYPE)
    if tuple(held.shape) == shape:
        return
    setattr(
        part, child, nn.Parameter(torch.empty(shape, dtype=held.dtype, device="meta"), requires_grad=False)
    )
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = shape
    if isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = shape
    if isinstance(part, nn.Linear) and child == "weight":
        part.out_features, part.in_features = shape


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, tied tensors once, under the first of their names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def written_dtype(tensor: Tensor) -> torch.dtype:
    # Scales are fp16 already, integers stay what they are; every other weight is written in bf16.
    return tensor.dtype if not tensor.is_floating_point() or tensor.dtype == torch.float16 else DTYPE


def task_of_config(config: Any) -> Task:
    architecture = next(iter(config.architectures or []), "")
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    return "embedding" if family(config.model_type).encoder else "causal-lm"


def _heads(config: Any) -> tuple[int, int]:
    """How many heads the queries of the original have, and how many its keys and values."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _head_width(config: Any) -> int:
    width = getattr(config, "true_hidden_size", None) or config.hidden_size
    return int(getattr(config, "head_dim", None) or width // config.num_attention_heads)


def _name_in(module: nn.Module, part: nn.Module) -> str:
    """The full name of a part."""
    return next(str(name) for name, found in module.named_modules() if found is part)


def _base_name(module: nn.Module) -> str:
    return str(cast(Any, module).base_model_prefix)
