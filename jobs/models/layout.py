"""Layout: a model's tensors as they are written, known from shapes alone. From it comes the exact size of the file."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, Literal

from jobs.models.families import Family, FeedForward, Task, family

Form = Literal["dense", "factored", "packed", "sparse"]
"""How a linear layer holds its weights: one float matrix, two thin ones, packed integers with scales, or the
places and values of those that are not zero."""

FILE = "slimfront.json"
"""Where an artifact's layout stands, beside how it came to be."""
_FORMAT = 3
"""Of that file; files of another are refused."""
# In the order in which safetensors lays them out.
_ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """dtype by the name that safetensors gives it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Packing:
    """Integers of `bits` bits; one scale (and zero point, unless symmetric) per `group` inputs of each row.

    group 0 is one scale per output channel. Where `group` does not divide the inputs, the last group of
    each row is the shorter rest (SmolLM2's width of 576 in groups of 128 is 4 groups and a half one).
    real_zeros: zero points are fp16 numbers; otherwise whole ones of a byte.
    input_scales: each input is multiplied by an fp16 number of its own before the weights meet it.
    activation_bits: inputs are rounded to so many bits, token by token, when the linear is called; 16 leaves
        them alone. Only with whole-row symmetric packing, where the integers' products are scaled once.
    """

    bits: int
    group: int
    symmetric: bool
    real_zeros: bool = False
    input_scales: bool = False
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if self.activation_bits != 16 and (self.group or not self.symmetric):
            raise ValueError(
                f"activation_bits={self.activation_bits} needs a symmetric packing with group=0, this has "
                f"symmetric={self.symmetric}, group={self.group}"
            )

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has."""
        return 1 if self.group == 0 else math.ceil(in_features / self.group)

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row's integers: 8 values are packed into `bits` bytes, the last few padded."""
        return math.ceil(in_features / 8) * self.bits


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer as it is stored: y = x Wᵀ + b with W of [out, in], dense in bf16, packed or sparse.

    kept: how many weights a sparse one holds, beside one bit for each place; None where it is not sparse.
    """

    out_features: int
    in_features: int
    bias: bool
    packing: Packing | None = None
    kept: int | None = None

    def packed(self, packing: Packing) -> LinearSpec:
        """The same linear with its weights packed."""
        return LinearSpec(self.out_features, self.in_features, self.bias, packing, self.kept)

    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors that hold it, by their names within the layer."""
        found: dict[str, TensorSpec] = {}
        if self.kept is not None:
            found["mask"] = TensorSpec("U8", (self.out_features, math.ceil(self.in_features / 8)))
            found["values"] = TensorSpec("BF16", (self.kept,))
        elif self.packing is None:
            found["weight"] = TensorSpec("BF16", (self.out_features, self.in_features))
        else:
            groups = self.packing.groups(self.in_features)
            row_bytes = self.packing.row_bytes(self.in_features)
            found["packed"] = TensorSpec("U8", (self.out_features, row_bytes))
            found["scales"] = TensorSpec("F16", (self.out_features, groups))
            if not self.packing.symmetric:
                dtype = "F16" if self.packing.real_zeros else "U8"
                found["zeros"] = TensorSpec(dtype, (self.out_features, groups))
            if self.packing.input_scales:
                found["input_scales"] = TensorSpec("F16", (self.in_features,))
        if self.bias:
            found["bias"] = TensorSpec("BF16", (self.out_features,))
        return found


@dataclass(frozen=True)
class Layout:
    """Every tensor of a model's file.

    blocks: the full name of the list of blocks. head_width: of one attention head; queries_per_key: how many
        query heads share one head of keys and values.
    linears: the linears inside the blocks, by their full names. One that was factorized stands as two:
        `NAME.v` (in → rank) and `NAME.u` (rank → out). One whose rounding error a term of low rank mends stands
        as three: these two and `NAME.rounded`.
    others: all other tensors (norms, embeddings of positions), by their full names.
    tables: the token embedding, as a linear from the width's to the vocabulary's side, and the head, unless it
        is the embedding's weight (then only its bias, if it has one, is in the file, among the others).
    """

    family: Family
    task: Task
    blocks: str
    head_width: int
    queries_per_key: int
    linears: Mapping[str, LinearSpec]
    others: Mapping[str, TensorSpec]
    tables: Mapping[str, LinearSpec] = field(default_factory=dict)

    @functools.cached_property
    def depth(self) -> int:
        """The number of blocks."""
        return len({self.block_of(name) for name in self.linears})

    def block_of(self, name: str) -> int:
        """The index of the block that a tensor or linear of this full name lies in; -1 outside the blocks."""
        prefix = self.blocks + "."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else -1

    def name(self, block: int, path: str) -> str:
        """The full name of what lies at `path` in a block."""
        return f"{self.blocks}.{block}.{path}"

    def feed_forwards(self) -> list[tuple[int, FeedForward]]:
        """The feed-forward networks, with the block that each lies in. Some families' configs say how many a
        block has; a factorized one counts too."""
        return [
            (block, one)
            for block in range(self.depth)
            for one in self.family.feed_forwards
            if self.name(block, one.out) in self.linears or self.name(block, f"{one.out}.v") in self.linears
        ]

    def forms_of(self, name: str) -> frozenset[Form]:
        """The forms of the linear of this full name: a thin one may be packed as well."""
        return _forms(*_stored(name, self.linears[name]))

    def forms(self) -> frozenset[Form]:
        """Which forms of linears the model holds."""
        stored = {_stored(name, spec) for name, spec in self.linears.items()}
        return frozenset(form for one in stored for form in _forms(*one))

    def with_linears(self, changed: Mapping[str, LinearSpec]) -> Layout:
        """The same layout with some linears replaced."""
        return dataclasses.replace(self, linears={**self.linears, **changed})

    def packed(self, packing: Packing) -> Layout:
        """The same layout with every linear of the blocks packed."""
        return self.with_linears({name: spec.packed(packing) for name, spec in self.linears.items()})

    def with_tables_packed(self, packing: Packing) -> Layout:
        """The same layout with token embedding and head packed."""
        return dataclasses.replace(
            self,
            tables={name: spec.packed(packing) for name, spec in self.tables.items()},
        )

    @property
    def matrices(self) -> dict[str, LinearSpec]:
        """Linears and tables alike, by their full names."""
        return {**self.linears, **self.tables}

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the file by its full name."""
        found = dict(self.others)
        parts = functools.cache(lambda spec: tuple(spec.tensors().items()))  # few linears differ
        for name, spec in self.matrices.items():
            for part, tensor in parts(spec):
                found[f"{name}.{part}"] = tensor
        return found

    def size_bytes(self) -> int:
        """The size of the safetensors file, to the byte."""
        return file_bytes(self.tensors())

    def parameters(self) -> int:
        """How many weights the model computes with, packed ones counted one by one."""
        linear = sum(
            spec.out_features * (spec.in_features + int(spec.bias)) for spec in self.matrices.values()
        )
        return linear + sum(math.prod(tensor.shape) for tensor in self.others.values())

    def decode_macs(self) -> int:
        """Multiply-adds of the block linears for one token: steers the search where no latency is known yet."""
        return sum(spec.out_features * spec.in_features for spec in self.linears.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "family": self.family.name,
            "task": self.task,
            "blocks": self.blocks,
            "head_width": self.head_width,
            "queries_per_key": self.queries_per_key,
            "linears": {name: dataclasses.asdict(spec) for name, spec in self.linears.items()},
            "others": {name: dataclasses.asdict(spec) for name, spec in self.others.items()},
            "tables": {name: dataclasses.asdict(spec) for name, spec in self.tables.items()},
        }

    @staticmethod
    def read(artifact: Path) -> Layout:
        """The layout of an artifact's folder."""
        return Layout.from_dict(json.loads((artifact / FILE).read_text())["layout"])

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Layout:
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"the model was written in format {record.get('format', 1)} of slimfront, this is format "
                f"{_FORMAT}: make it again"
            )
        return Layout(
            family(record["family"]),
            record["task"],
            record["blocks"],
            record["head_width"],
            record["queries_per_key"],
            {name: _linear_spec(spec) for name, spec in record["linears"].items()},
            {
                name: TensorSpec(spec["dtype"], tuple(spec["shape"]))
                for name, spec in record["others"].items()
            },
            {name: _linear_spec(spec) for name, spec in record["tables"].items()},
        )


def file_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """The size of a safetensors file of these tensors, to the byte: the header, padded to 8 bytes, and the tensors."""
    # safetensors lays tensors out by type, the widest first, then by name.
    names: dict[str, list[str]] = {dtype: [] for dtype in _ITEM_BYTES}
    for name, tensor in tensors.items():
        names[tensor.dtype].append(name)
    about = functools.cache(lambda tensor: (_described(tensor), tensor.size_bytes))
    texts, end = ['{"__metadata__":{"format":"pt"}'], 0
    for name in itertools.chain.from_iterable(map(sorted, names.values())):
        text, size = about(tensors[name])
        offset, end = end, end + size
        texts.append(f'{encode_basestring(name)}:{text[:-1]},"data_offsets":[{offset},{end}]}}')
    header = ",".join(texts) + "}"
    return 8 + math.ceil(len(header.encode()) / 8) * 8 + end


def _described(tensor: TensorSpec) -> str:
    """What a header says of a tensor, but for its place."""
    return f'{{"dtype":"{tensor.dtype}","shape":[{",".join(map(str, tensor.shape))}]}}'


def _stored(name: str, spec: LinearSpec) -> tuple[bool, bool, bool]:
    """Whether a linear of this full name is one of two thin ones, packed, sparse."""
    return name.endswith((".u", ".v")), spec.packing is not None, spec.kept is not None


def _forms(factored: bool, packed: bool, sparse: bool) -> frozenset[Form]:
    shape: Form = "factored" if factored else "dense"
    stored: list[Form] = ["packed"] if packed else []
    stored += ["sparse"] if sparse else []
    return frozenset({shape, *stored})


def _linear_spec(record: Mapping[str, Any]) -> LinearSpec:
    packing = Packing(**record["packing"]) if record["packing"] else None
    return LinearSpec(**{**record, "packing": packing})
