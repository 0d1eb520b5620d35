"""The format `gguf`: one file that llama.cpp runs. The one door to the library gguf.

Our integers go over as they are, into blocks of 32 that each have an fp16 scale; a group of 64 is two blocks of the
same scale. What a linear of the blocks becomes:

    4, 3 or 2 bits, symmetric   Q4_0   d (q − 8)   exact
    3 or 2 bits, whole zeros    Q4_0               exact: q − zero fits into 4 bits
    4 bits, any zeros           Q4_1   d q + m     m = −d · zero, rounded to fp16: off by 2**-11 of itself, or
                                                   at most 0.008 d, where rounding the weight was off by 0.5 d
    8 bits, symmetric           Q8_0   d q         exact
    dense, sparse               BF16               exact

Norms and biases are F32. A packed embedding or head is one of these too, or BF16 where its zero points have no place.
Rows of queries and keys of Llama and Mistral are put in the order that llama.cpp rotates them in, with their scales.
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
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from torch import Tensor

from jobs.formats import gguf_tokenizer, stock
from jobs.models import loading, tokenizers
from jobs.models.bit_packing import unpack
from jobs.models.layout import Layout, LinearSpec, Packing

WEIGHTS = "*.gguf"

GGUF_FILE = "model.gguf"

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""By family, as llama.cpp calls them."""

_BLOCK = 32
_ALIGNMENT = 32
_ROWS = 4096
"""Rows of a table that are packed at once."""


@dataclass(frozen=True)
class Kind:
    """How a tensor is held: `bytes` for each `values` of a row. number: as llama.cpp numbers files mostly of it."""

    name: str
    values: int
    bytes: int
    number: int

    def row_bytes(self, columns: int) -> int:
        return columns // self.values * self.bytes


Q4_0, Q4_1, Q8_0 = Kind("Q4_0", 32, 18, 2), Kind("Q4_1", 32, 20, 3), Kind("Q8_0", 32, 34, 7)
BF16, F32 = Kind("BF16", 1, 2, 32), Kind("F32", 1, 4, 0)


@dataclass(frozen=True)
class Planned:
    """One tensor of the file. source: its full name in the artifact, without what follows a packed one's."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size_bytes(self) -> int:
        rows = math.prod(self.shape[:-1])
        return rows * self.kind.row_bytes(self.shape[-1])


def missing() -> str | None:
    if importlib.util.find_spec("gguf") is None:
        return "the format gguf needs the library gguf: pip install 'slimfront[gguf]'"
    return None


def refusal(layout: Layout) -> str | None:
    family = layout.family.name
    if family not in _ARCHITECTURES:
        return f"a {family} is not among the families written as GGUF ({', '.join(_ARCHITECTURES)})"
    if layout.task != "causal-lm":
        return f"GGUF files are written of causal-lm models, and this one's task is {layout.task}"
    for name, spec in layout.linears.items():
        if spec.packing is not None:
            reason = _cannot(spec, spec.packing)
            if reason is not None:
                return f"quantizing left {name} {reason}"
        if spec.bias and family == "qwen3":
            return f"{name} has a bias, and a qwen3 of llama.cpp has none"
    return stock.refusal(layout) or _heads(layout)


def size_bytes(layout: Layout, original: Path) -> int:
    plan = _plan(layout)
    header = _head_bytes(layout, original, plan) + _words_bytes(original, _rows(layout), _stamp(original))
    return _aligned(header) + sum(_aligned(tensor.size_bytes) for tensor in plan)


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    import gguf

    layout = Layout.read(artifact)
    plan = _plan(layout)
    writer = gguf.GGUFWriter(out / GGUF_FILE, _ARCHITECTURES[layout.family.name])
    _describe(writer, layout, artifact, plan)
    _add_words(writer, artifact, _rows(layout))
    with safe_open(artifact / loading.WEIGHTS, framework="pt") as stored:
        for planned in plan:
            writer.add_tensor(
                planned.name,
                _bytes_of(planned, layout, stored).numpy(),
                raw_dtype=gguf.GGMLQuantizationType[planned.kind.name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    tokenizers.copy_tokenizer(artifact, out)


def _cannot(spec: LinearSpec, packing: Packing) -> str | None:
    """What of a packed linear has no place in blocks of 32."""
    if packing.activation_bits != 16:
        return f"rounding its activations to {packing.activation_bits} bits, after scales of their own"
    if packing.input_scales:
        return "a scale per input, which cannot be moved into other weights without rounding these again"
    if packing.bits == 8 and not packing.symmetric:
        return "8-bit integers with zero points, for which Q8_0 has no place; symmetric ones have one"
    if spec.in_features % _BLOCK:
        return f"rows of {spec.in_features}, which are no whole blocks of {_BLOCK}"
    if packing.group % _BLOCK:
        return f"groups of {packing.group}, which are no whole blocks of {_BLOCK}"
    return None


def _heads(layout: Layout) -> str | None:
    if layout.family.name != "qwen2":
        return None
    narrower = stock.mismatched_heads(layout)
    if narrower is None:
        return None
    out, spec = narrower
    return (
        f"llama.cpp takes the heads of a qwen2 to be as wide together as the model, and {out} reads "
        f"{spec.in_features} and writes {spec.out_features}"
    )


def _kind(spec: LinearSpec) -> Kind:
    packing = spec.packing
    if packing is None or _cannot(spec, packing) is not None:
        return BF16
    if packing.bits == 8:
        return Q8_0
    exact = packing.symmetric or (packing.bits < 4 and not packing.real_zeros)
    return Q4_0 if exact else Q4_1


def _plan(layout: Layout) -> list[Planned]:
    """Every tensor of the file, in order."""
    import gguf

    arch = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[layout.family.name]
    )
    names = gguf.get_tensor_name_map(arch, layout.depth)

    def called(name: str) -> str:
        return str(names.get_name(name, try_suffixes=(".weight", ".bias")))

    found = []
    for name, spec in (*layout.tables.items(), *layout.linears.items()):
        shape = (spec.out_features, spec.in_features)
        found.append(Planned(called(f"{name}.weight"), name, shape, _kind(spec)))
        if spec.bias:
            found.append(Planned(called(f"{name}.bias"), f"{name}.bias", shape[:1], F32))
    for name, tensor in layout.others.items():
        found.append(Planned(called(name), name, tensor.shape, F32))
    return found


def _rows(layout: Layout) -> int:
    """Of the token embedding."""
    return next(iter(layout.tables.values())).out_features


def _bytes_of(planned: Planned, layout: Layout, stored: Any) -> Tensor:
    """The tensor's rows as bytes, or fp32 numbers."""
    order = _order(layout, planned)
    if planned.source not in layout.matrices:
        return cast(Tensor, stored.get_tensor(planned.source)).float()[order]
    spec = layout.matrices[planned.source]
    held = {part: stored.get_tensor(f"{planned.source}.{part}") for part in spec.tensors() if part != "bias"}
    if planned.kind == BF16:
        return stock.dense_weight(spec, held)[order].contiguous().view(torch.uint8)
    rows = torch.split(torch.arange(spec.out_features)[order], _ROWS)
    return torch.cat([_blocks(planned.kind, spec, held, some) for some in rows])


def _order(layout: Layout, planned: Planned) -> slice | Int[Tensor, " rows"]:
    """Where llama.cpp's rows stand among ours: it rotates neighbours, transformers the halves of a head."""
    attention = layout.family.attention
    turned = (f".{attention.query}", f".{attention.key}")
    if _ARCHITECTURES[layout.family.name] != "llama" or not planned.source.removesuffix(".bias").endswith(
        turned
    ):
        return slice(None)
    rows = torch.arange(planned.shape[0])
    return rows.view(-1, 2, layout.head_width // 2).transpose(1, 2).flatten()


def _blocks(
    kind: Kind, spec: LinearSpec, held: Mapping[str, Tensor], rows: Int[Tensor, " rows"]
) -> UInt8[Tensor, "rows row_bytes"]:
    """These rows of a packed linear as the blocks of `kind`."""
    packing = spec.packing
    assert packing is not None
    integers = unpack(held["packed"][rows], packing.bits, spec.in_features).to(torch.int16)
    scales = held["scales"][rows]
    parts = [_per_block(scales, spec, packing)]
    if kind == Q4_1:
        zeros = held["zeros"][rows]
        minima = -(scales.float() * zeros.float())
        if not bool(torch.isfinite(minima.half()).all()):
            raise ValueError("weights are too large for fp16 minima: GGUF's Q4_1 cannot hold them")
        parts.append(_per_block(minima.half(), spec, packing))
    else:
        middle = 2 ** (packing.bits - 1)
        zeros = middle if packing.symmetric else _spread(held["zeros"][rows], spec, packing)
        integers = integers - zeros + (8 if kind == Q4_0 else 0)
    blocks = integers.view(len(rows), -1, _BLOCK)
    if kind == Q8_0:
        parts.append(blocks.to(torch.int8).view(torch.uint8))
    else:
        low, high = blocks.to(torch.uint8).chunk(2, dim=-1)
        parts.append(low | high << 4)
    return torch.cat(parts, dim=-1).flatten(1)


def _per_block(
    per_group: Float[Tensor, "rows groups"], spec: LinearSpec, packing: Packing
) -> UInt8[Tensor, "rows blocks two"]:
    """An fp16 number per group as the two bytes of each of its blocks."""
    blocks = spec.in_features // _BLOCK
    repeated = per_group.repeat_interleave((packing.group or spec.in_features) // _BLOCK, dim=1)[:, :blocks]
    return repeated.contiguous().unsqueeze(-1).view(torch.uint8)


def _spread(zeros: Int[Tensor, "rows groups"], spec: LinearSpec, packing: Packing) -> Int[Tensor, "rows in"]:
    wide = zeros.to(torch.int16).repeat_interleave(packing.group or spec.in_features, dim=1)
    return wide[:, : spec.in_features]


def _describe(writer: Any, layout: Layout, folder: Path, plan: list[Planned]) -> None:
    """Add what llama.cpp must know of the model: `folder`'s config, and the layout's shapes."""
    import gguf

    config = loading.load_config(folder)
    attention = layout.family.attention
    first = {
        path: layout.linears[layout.name(0, path)]
        for path in (attention.query, attention.key, attention.out, layout.family.feed_forwards[0].out)
    }
    kinds = Counter(planned.kind.number for planned in plan if len(planned.shape) == 2)
    writer.add_type("model")
    writer.add_name(f"slimfront {layout.family.name}")
    writer.add_file_type(kinds.most_common(1)[0][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # Attention within a window is full attention as long as the text fits into it.
    window = getattr(config, "sliding_window", None) if layout.family.name == "mistral" else None
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(first[attention.out].out_features)
    writer.add_block_count(layout.depth)
    writer.add_feed_forward_length(first[layout.family.feed_forwards[0].out].in_features)
    writer.add_head_count(first[attention.query].out_features // layout.head_width)
    writer.add_head_count_kv(first[attention.key].out_features // layout.head_width)
    writer.add_key_length(layout.head_width)
    writer.add_value_length(layout.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(_rows(layout))
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
        raise ValueError(
            f"GGUF files are written of models with positions of rope_type default or linear, not {kind}"
        )


def _add_words(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a folder."""
    import gguf

    found = gguf_tokenizer.read_tokenizer(folder, rows)
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.split)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.space_first is not None:
        writer.add_add_space_prefix(found.space_first)
    special = gguf.SpecialVocab(folder, load_merges=found.kind == "gpt2", n_vocab=rows)
    # A config that transformers wrote leaves out what is the family's default: both must give one file.
    config = loading.load_config(folder)
    for kind in special.special_token_types:
        number = getattr(config, f"{kind}_token_id", None)
        if isinstance(number, int) and number < rows:
            special.special_token_ids.setdefault(kind, number)
    special.special_token_ids = dict(sorted(special.special_token_ids.items()))
    special.add_to_gguf(writer, quiet=True)


def _head_bytes(layout: Layout, folder: Path, plan: list[Planned]) -> int:
    """What comes before the tensors, without the tokenizer."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        writer = gguf.GGUFWriter(Path(scratch) / GGUF_FILE, _ARCHITECTURES[layout.family.name])
        _describe(writer, layout, folder, plan)
        for planned in plan:
            writer.add_tensor_info(
                planned.name,
                planned.shape,
                np.dtype(np.float32),  # not looked at where raw_dtype is given
                planned.size_bytes,
                gguf.GGMLQuantizationType[planned.kind.name],
            )
        return _written(writer)


@lru_cache(maxsize=4)
def _words_bytes(folder: Path, rows: int, stamp: int) -> int:
    """What the tokenizer takes, which all models of a study share. stamp: when its file was changed."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        empty = _written(gguf.GGUFWriter(Path(scratch) / "empty", "none"))
        writer = gguf.GGUFWriter(Path(scratch) / GGUF_FILE, "none")
        _add_words(writer, folder, rows)
        return _written(writer) - empty


def _stamp(folder: Path) -> int:
    return max((file.stat().st_mtime_ns for file in folder.glob("*token*")), default=0)


def _written(writer: Any) -> int:
    """The bytes of what a writer knows so far, without tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return int(Path(writer.path).stat().st_size)


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
