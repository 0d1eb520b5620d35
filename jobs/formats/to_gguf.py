"""The format `gguf`: one file that llama.cpp runs. The one door to the library gguf.

Linears are stored as listed in `jobs.formats.gguf_blocks`, norms and biases as F32. A packed embedding or head is
stored like a linear, or as BF16 if no other type can represent it. The rows of queries and keys of Llama and Mistral
are reordered as llama.cpp rotates them.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from jobs.formats import gguf_blocks, gguf_tokenizer, stock
from jobs.formats.gguf_blocks import BF16, F32, Kind, kind_of, packing_refusal
from jobs.models import loading, tokenizers
from jobs.models.layout import Layout

WEIGHTS = "*.gguf"

GGUF_FILE = "model.gguf"

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""llama.cpp's names of the supported families."""

_ALIGNMENT = 32
"""Bytes: each tensor starts at a multiple."""
_ROWS = 4096
"""Rows of a table that are packed at a time, to limit memory."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file, before it is written."""

    name: str
    source: str
    """Full name in the artifact: of a tensor, or of a linear or table for its weight."""
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the tensor without padding."""
        rows = math.prod(self.shape[:-1])
        return rows * self.kind.row_bytes(self.shape[-1])


def missing() -> str | None:
    if importlib.util.find_spec("gguf") is None:
        return "the format gguf needs the library gguf: pip install 'slimfront[gguf]'"
    return None


def refusal(layout: Layout) -> str | None:
    family = layout.family.name
    if family not in _ARCHITECTURES:
        return f"a {family} is not among the families supported as GGUF ({', '.join(_ARCHITECTURES)})"
    if layout.task != "causal-lm":
        return f"GGUF files are written for causal-lm models, and the task of this model is {layout.task}"
    for name, spec in layout.linears.items():
        if spec.packing is not None:
            reason = packing_refusal(spec, spec.packing)
            if reason is not None:
                return f"quantizing left {name} {reason}"
        if spec.bias and family == "qwen3":
            return f"{name} has a bias, and llama.cpp supports none in a qwen3"
    return stock.refusal(layout) or _heads_refusal(layout)


def size_bytes(layout: Layout, original: Path) -> int:
    plan = _plan(layout)
    rows = _vocabulary_rows(layout)
    header = _header_bytes(layout, original, plan) + _tokenizer_bytes(original, rows, _changed_at(original))
    return _aligned(header) + sum(_aligned(tensor.size_bytes) for tensor in plan)


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    import gguf

    layout = Layout.read(artifact)
    plan = _plan(layout)
    writer = gguf.GGUFWriter(out / GGUF_FILE, _ARCHITECTURES[layout.family.name])
    _describe(writer, layout, artifact, plan)
    _add_tokenizer(writer, artifact, _vocabulary_rows(layout))
    with safe_open(artifact / loading.WEIGHTS, framework="pt") as weights:
        for planned in plan:
            writer.add_tensor(
                planned.name,
                _tensor_data(planned, layout, weights).numpy(),
                raw_dtype=gguf.GGMLQuantizationType[planned.kind.name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    tokenizers.copy_tokenizer(artifact, out)


def _heads_refusal(layout: Layout) -> str | None:
    if layout.family.name != "qwen2":
        return None
    narrower = stock.mismatched_heads(layout)
    if narrower is None:
        return None
    out, spec = narrower
    return (
        f"llama.cpp needs the heads of a qwen2 to be together as wide as the model, and {out} reads "
        f"{spec.in_features} and writes {spec.out_features}"
    )


def _plan(layout: Layout) -> list[PlannedTensor]:
    """Return every tensor of the file, in order."""
    import gguf

    arch = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[layout.family.name]
    )
    names = gguf.get_tensor_name_map(arch, layout.depth)

    def gguf_name(name: str) -> str:
        return str(names.get_name(name, try_suffixes=(".weight", ".bias")))

    plan = []
    for name, spec in (*layout.tables.items(), *layout.linears.items()):
        shape = (spec.out_features, spec.in_features)
        plan.append(PlannedTensor(gguf_name(f"{name}.weight"), name, shape, kind_of(spec)))
        if spec.bias:
            plan.append(PlannedTensor(gguf_name(f"{name}.bias"), f"{name}.bias", shape[:1], F32))
    for name, tensor in layout.others.items():
        plan.append(PlannedTensor(gguf_name(name), name, tensor.shape, F32))
    return plan


def _vocabulary_rows(layout: Layout) -> int:
    """Return the number of rows of the token embedding."""
    return next(iter(layout.tables.values())).out_features


def _tensor_data(planned: PlannedTensor, layout: Layout, weights: Any) -> Tensor:
    """Return a tensor's rows as bytes, or as fp32 numbers. weights: the artifact's open safetensors file."""
    order = _row_order(layout, planned)
    if planned.source not in layout.matrices:
        return cast(Tensor, weights.get_tensor(planned.source)).float()[order]
    spec = layout.matrices[planned.source]
    parts = [part for part in spec.tensors() if part != "bias"]
    tensors = {part: weights.get_tensor(f"{planned.source}.{part}") for part in parts}
    if planned.kind == BF16:
        return stock.dense_weight(spec, tensors)[order].contiguous().view(torch.uint8)
    chunks = torch.split(torch.arange(spec.out_features)[order], _ROWS)
    return torch.cat([gguf_blocks.blocks_of(planned.kind, spec, tensors, rows) for rows in chunks])


def _row_order(layout: Layout, planned: PlannedTensor) -> slice | Int[Tensor, " rows"]:
    """Return the indices of our rows in llama.cpp's order.

    Rotary embeddings rotate neighbouring rows in llama.cpp, and the two halves of a head in transformers.
    """
    attention = layout.family.attention
    rotated = (f".{attention.query}", f".{attention.key}")
    is_rotated = planned.source.removesuffix(".bias").endswith(rotated)
    if _ARCHITECTURES[layout.family.name] != "llama" or not is_rotated:
        return slice(None)
    rows = torch.arange(planned.shape[0])
    return rows.view(-1, 2, layout.head_width // 2).transpose(1, 2).flatten()


def _describe(writer: Any, layout: Layout, folder: Path, plan: list[PlannedTensor]) -> None:
    """Add the metadata of the model, from the config of `folder` and the shapes of the layout."""
    import gguf

    config = loading.load_config(folder)
    attention = layout.family.attention
    first = {
        path: layout.linears[layout.name(0, path)]
        for path in (attention.query, attention.key, attention.out, layout.family.feed_forwards[0].out)
    }
    kinds = Counter(planned.kind.file_type for planned in plan if len(planned.shape) == 2)
    writer.add_type("model")
    writer.add_name(f"slimfront {layout.family.name}")
    writer.add_file_type(kinds.most_common(1)[0][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    context = config.max_position_embeddings
    if layout.family.name == "mistral":
        # Attention within a sliding window equals full attention as long as the text fits into the window.
        context = min(context, getattr(config, "sliding_window", None) or context)
    writer.add_context_length(context)
    writer.add_embedding_length(first[attention.out].out_features)
    writer.add_block_count(layout.depth)
    writer.add_feed_forward_length(first[layout.family.feed_forwards[0].out].in_features)
    writer.add_head_count(first[attention.query].out_features // layout.head_width)
    writer.add_head_count_kv(first[attention.key].out_features // layout.head_width)
    writer.add_key_length(layout.head_width)
    writer.add_value_length(layout.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(_vocabulary_rows(layout))
    writer.add_rope_dimension_count(layout.head_width)
    _describe_positions(writer, config.rope_parameters)


def _describe_positions(writer: Any, rope: Mapping[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind != "default":
        raise ValueError(f"the config has rope_type {kind}; GGUF files are written for default and linear")


def _add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a model folder."""
    import gguf

    tokenizer = gguf_tokenizer.read_tokenizer(folder, rows)
    writer.add_tokenizer_model(tokenizer.kind)
    writer.add_tokenizer_pre(tokenizer.pre_tokenizer)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.adds_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.adds_space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=tokenizer.kind == "gpt2", n_vocab=rows)
    # transformers omits the family's defaults from a config: a file must not depend on whether they are stated.
    config = loading.load_config(folder)
    for kind in special.special_token_types:
        number = getattr(config, f"{kind}_token_id", None)
        if isinstance(number, int) and number < rows:
            special.special_token_ids.setdefault(kind, number)
    special.special_token_ids = dict(sorted(special.special_token_ids.items()))
    special.add_to_gguf(writer, quiet=True)


def _header_bytes(layout: Layout, folder: Path, plan: list[PlannedTensor]) -> int:
    """Return the bytes before the tensors, without those of the tokenizer."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        writer = gguf.GGUFWriter(Path(scratch) / GGUF_FILE, _ARCHITECTURES[layout.family.name])
        _describe(writer, layout, folder, plan)
        for planned in plan:
            writer.add_tensor_info(
                planned.name,
                planned.shape,
                np.dtype(np.float32),  # ignored, since raw_dtype is given
                planned.size_bytes,
                gguf.GGMLQuantizationType[planned.kind.name],
            )
        return _written(writer)


@lru_cache(maxsize=4)
def _tokenizer_bytes(folder: Path, rows: int, changed_at: int) -> int:
    """Return the bytes of the tokenizer, which all models of a study share.

    changed_at: the time of the last change of its files, a part of the key of this function's cache.
    """
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        empty = _written(gguf.GGUFWriter(Path(scratch) / "empty", "none"))
        writer = gguf.GGUFWriter(Path(scratch) / GGUF_FILE, "none")
        _add_tokenizer(writer, folder, rows)
        return _written(writer) - empty


def _changed_at(folder: Path) -> int:
    """Return when the tokenizer's files were last changed, in nanoseconds."""
    return max((file.stat().st_mtime_ns for file in folder.glob("*token*")), default=0)


def _written(writer: Any) -> int:
    """Write the header and the metadata added so far, without tensors, and return their bytes."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return int(Path(writer.path).stat().st_size)


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
