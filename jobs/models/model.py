"""Models in memory: where their parts are, how to replace one, and how to give a module another layout."""

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
"""The type of weights in memory and in files: 2 bytes each (docs/decisions/bf16.md)."""

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
               torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip
"""safetensors' names of types."""

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
"""Attributes of transformers' attention modules that store the number of heads."""
_HEAD_WIDTHS = ("split_size", "all_head_size")
"""Attributes that store the width of all heads together."""


@dataclass(frozen=True)
class Model:
    """A model in memory. "Full name" means the name of a submodule or tensor within `module`."""

    module: nn.Module
    family: Family
    folder: Path
    """The folder that tokenizer and config came from."""
    device: str = "cpu"
    """The device it computes on. Its parts stay on the CPU until `jobs.models.placement` moves them."""

    @property
    def task(self) -> Task:
        return task_of_config(self.config)

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return _head_width(self.config)

    @property
    def base(self) -> nn.Module:
        """Return the model without its head: embeddings, blocks and final norm."""
        return cast(nn.Module, getattr(self.module, _base_name(self.module), self.module))

    @property
    def base_prefix(self) -> str:
        """Return the prefix of the full names of the base model's parts; empty if the module is the base model."""
        return "" if self.base is self.module else f"{_base_name(self.module)}."

    @property
    def blocks_name(self) -> str:
        """Return the full name of the list of blocks."""
        return self.base_prefix + self.family.blocks

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.blocks_name))

    @property
    def config(self) -> Any:
        return self.module.config

    def answer(self, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch ..."]:
        """Return the logits of every next token or of the classes; for the task embedding, the last hidden states."""
        options = {} if self.family.encoder else {"use_cache": False}
        output = self.module(rows, **options)
        if self.task == "embedding":
            return cast(Tensor, output.last_hidden_state)
        return cast(Tensor, output.logits)

    def linears(self) -> dict[str, nn.Module]:
        """Return every linear inside the blocks by its full name; a factorized one counts as its two parts."""
        prefix = self.blocks_name + "."
        return {
            name: module
            for name, module in self.module.named_modules()
            if name.startswith(prefix) and spec_of(module) is not None
        }

    def tables(self) -> dict[str, nn.Module]:
        """Return the token embedding and the head by full name, without a head that is tied (see `tied_head`)."""
        module: Any = self.module
        tables = {_name_in(module, module.get_input_embeddings()): module.get_input_embeddings()}
        head = module.get_output_embeddings()
        if head is not None and self.tied_head() is None:
            tables[_name_in(module, head)] = head
        return tables

    def tied_head(self) -> str | None:
        """Return the full name of the head if its weight is the token embedding; None otherwise."""
        module: Any = self.module
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        tied = isinstance(head, TiedHead) or (
            isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
        )
        if not tied:
            return None
        return _name_in(module, head)

    def replace_embedding(self, embedding: nn.Module) -> None:
        """Replace the token embedding by `embedding`, plain or packed; a tied head stays tied."""
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
        """Replace the submodule of this full name by `layer`."""
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, layer)

    def layout(self) -> Layout:
        """Return the layout of the file that `loading.save` would write now."""
        linears = {name: cast(LinearSpec, spec_of(layer)) for name, layer in self.linears().items()}
        tables = {name: cast(LinearSpec, spec_of(table)) for name, table in self.tables().items()}
        matrix_tensors = {
            f"{name}.{part}" for name, spec in (linears | tables).items() for part in spec.tensors()
        }
        other_tensors = {
            name: TensorSpec(DTYPE_NAMES[written_dtype(tensor)], tuple(tensor.shape))
            for name, tensor in distinct_tensors(self.module).items()
            if name not in matrix_tensors
        }
        query_heads, key_heads = _head_counts(self.config)
        return Layout(
            family=self.family,
            task=self.task,
            blocks=self.blocks_name,
            head_width=self.head_width,
            queries_per_key=query_heads // key_heads,
            linears=linears,
            others=other_tensors,
            tables=tables,
        )


def fit_heads(model: Model) -> None:
    """Set the number of heads in each attention module that stores it, from the shapes of its linears."""
    attention = model.family.attention
    for block in model.blocks:
        module: Any = block.get_submodule(attention.module)
        out = block.get_submodule(attention.out)
        if isinstance(out, (LowRankLinear, CorrectedLinear)):
            out = out.v
        heads_width = cast(LinearSpec, spec_of(out)).in_features
        values = dict.fromkeys(_HEAD_COUNTS, heads_width // model.head_width)
        values |= dict.fromkeys(_HEAD_WIDTHS, heads_width)
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)


def reshape(model: Model, layout: Layout) -> None:
    """Give a module without weights the layers and tensor shapes of `layout`; new tensors are on `meta`."""
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
    """Replace the parameter of this full name by one on `meta` unless it already has this shape."""
    owner, _, child = name.rpartition(".")
    part: Any = module.get_submodule(owner)
    tensor = getattr(part, child)
    if tensor is None:  # a bias that a step has added
        tensor = torch.empty(0, dtype=DTYPE)
    if tuple(tensor.shape) == shape:
        return
    resized = torch.empty(shape, dtype=tensor.dtype, device="meta")
    setattr(part, child, nn.Parameter(resized, requires_grad=False))
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = shape
    if isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = shape
    if isinstance(part, nn.Linear) and child == "weight":
        part.out_features, part.in_features = shape


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module; tied tensors appear once, under the first of their names."""
    tensors: dict[str, Tensor] = {}
    ids: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in ids:
            ids.add(id(tensor))
            tensors[name] = tensor
    return tensors


def written_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type that a file stores a tensor in: integers and fp16 scales as they are, all else in bf16."""
    if tensor.dtype == torch.float16 or not tensor.is_floating_point():
        return tensor.dtype
    return DTYPE


def task_of_config(config: Any) -> Task:
    """Return the task of a model by the architecture that its config names."""
    architecture = next(iter(config.architectures or []), "")
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    if family(config.model_type).encoder:
        return "embedding"
    return "causal-lm"


def _head_counts(config: Any) -> tuple[int, int]:
    """Return the numbers of query heads and of key heads in the original model."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _head_width(config: Any) -> int:
    width = getattr(config, "true_hidden_size", None) or config.hidden_size
    return int(getattr(config, "head_dim", None) or width // config.num_attention_heads)


def _name_in(module: nn.Module, part: nn.Module) -> str:
    """Return the full name of a part."""
    return next(str(name) for name, submodule in module.named_modules() if submodule is part)


def _base_name(module: nn.Module) -> str:
    return str(cast(Any, module).base_model_prefix)
