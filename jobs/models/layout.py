"""Layouts: the names, types and shapes of all tensors of a model's file, and from them the exact size of the file.

No weights are read: a layout follows from a config, from a module in memory, or from an artifact's `slimfront.json`.
"""

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
"""How a linear stores its weight: one float matrix, two thin ones, packed integers with scales, or the positions and
values of its nonzero weights."""

LAYOUT_FILE = "slimfront.json"
"""The file of an artifact that holds its layout and its provenance."""
_FORMAT = 3
"""Version of the layout in `LAYOUT_FILE`; other versions are refused."""
_ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}
"""Bytes per element by safetensors' names of types, in the order in which safetensors writes the types."""


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of one tensor of a file."""

    dtype: str
    """safetensors' name of the type: one of `_ITEM_BYTES`."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Packing:
    """How a weight is quantized and packed: integers with one scale per group of inputs of each row."""

    bits: int
    """Bits of each integer."""
    group: int
    """Inputs that share a scale; 0 gives each output channel one scale.

    Where it does not divide the inputs, the last group of each row is shorter: a width of 576 in groups of 128 has
    4 full groups and one of 64."""
    symmetric: bool
    """Without zero points: the middle integer, 2**(bits-1), stands for 0."""
    real_zeros: bool = False
    """Zero points are fp16 numbers; otherwise they are integers of one byte."""
    input_scales: bool = False
    """Each input is multiplied by its own fp16 scale before the weight is applied."""
    activation_bits: int = 16
    """Bits that the inputs are rounded to, token by token, when the linear is called; 16 does not round them.

    Fewer need a symmetric packing with group 0, so that the product of integers is scaled once."""

    def __post_init__(self) -> None:
        if self.activation_bits != 16 and (self.group or not self.symmetric):
            raise ValueError(
                f"activation_bits={self.activation_bits} needs a symmetric packing with group=0, "
                f"got symmetric={self.symmetric}, group={self.group}"
            )

    def groups(self, in_features: int) -> int:
        """Return the number of groups in a row of `in_features` weights."""
        return 1 if self.group == 0 else math.ceil(in_features / self.group)

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of one row of integers: 8 values take `bits` bytes, and the last 8 are padded."""
        return math.ceil(in_features / 8) * self.bits


@dataclass(frozen=True)
class LinearSpec:
    """How one linear y = x Wᵀ + b, W [out, in], is stored: dense in bf16, packed or sparse.

    Embedding tables have one too: their rows are the outputs.
    """

    out_features: int
    in_features: int
    bias: bool
    packing: Packing | None = None
    """None where the weight is not quantized."""
    kept: int | None = None
    """Number of weights that a sparse linear stores, with a mask of one bit per weight; None where it is not sparse."""

    def packed(self, packing: Packing) -> LinearSpec:
        """Return the same linear with a packed weight."""
        return LinearSpec(self.out_features, self.in_features, self.bias, packing, self.kept)

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that store this linear, by their names within the layer."""
        tensors: dict[str, TensorSpec] = {}
        if self.kept is not None:
            tensors["mask"] = TensorSpec("U8", (self.out_features, math.ceil(self.in_features / 8)))
            tensors["values"] = TensorSpec("BF16", (self.kept,))
        elif self.packing is None:
            tensors["weight"] = TensorSpec("BF16", (self.out_features, self.in_features))
        else:
            groups = self.packing.groups(self.in_features)
            row_bytes = self.packing.row_bytes(self.in_features)
            tensors["packed"] = TensorSpec("U8", (self.out_features, row_bytes))
            tensors["scales"] = TensorSpec("F16", (self.out_features, groups))
            if not self.packing.symmetric:
                dtype = "F16" if self.packing.real_zeros else "U8"
                tensors["zeros"] = TensorSpec(dtype, (self.out_features, groups))
            if self.packing.input_scales:
                tensors["input_scales"] = TensorSpec("F16", (self.in_features,))
        if self.bias:
            tensors["bias"] = TensorSpec("BF16", (self.out_features,))
        return tensors


@dataclass(frozen=True)
class Layout:
    """The shapes of all tensors of a model's file. "Full name" means the name within the whole module."""

    family: Family
    task: Task
    blocks: str
    """Full name of the list of blocks."""
    head_width: int
    """Width of one attention head."""
    queries_per_key: int
    """Number of query heads that share one head of keys and values."""
    linears: Mapping[str, LinearSpec]
    """The linears inside the blocks, by full name.

    A factorized linear appears as two: `NAME.v` (in → rank) and `NAME.u` (rank → out). A quantized linear with a
    low-rank correction appears as three: these two and `NAME.rounded`."""
    others: Mapping[str, TensorSpec]
    """All other tensors (norms, position embeddings), by full name."""
    tables: Mapping[str, LinearSpec] = field(default_factory=dict)
    """The token embedding, with the vocabulary as outputs, then the head, by full name.

    A head whose weight is the embedding's is not listed; its bias, if it has one, is in `others`."""

    @functools.cached_property
    def depth(self) -> int:
        """Return the number of blocks."""
        return len({self.block_of(name) for name in self.linears})

    def block_of(self, name: str) -> int:
        """Return the index of the block that contains the tensor or linear of this full name; -1 outside the blocks."""
        prefix = self.blocks + "."
        if not name.startswith(prefix):
            return -1
        return int(name[len(prefix) :].split(".", 1)[0])

    def name(self, block: int, path: str) -> str:
        """Return the full name of the submodule at `path` in a block."""
        return f"{self.blocks}.{block}.{path}"

    def feed_forwards(self) -> list[tuple[int, FeedForward]]:
        """Return each feed-forward network, factorized or not, with the index of its block.

        A family lists the most that a block can have; a model may have fewer.
        """
        networks = []
        for block in range(self.depth):
            for network in self.family.feed_forwards:
                out = self.name(block, network.out)
                if out in self.linears or f"{out}.v" in self.linears:
                    networks.append((block, network))
        return networks

    def forms_of(self, name: str) -> frozenset[Form]:
        """Return the forms of the linear of this full name: a factored one may also be packed or sparse."""
        return _forms(*_form_flags(name, self.linears[name]))

    def forms(self) -> frozenset[Form]:
        """Return all forms of linears in the model."""
        combinations = {_form_flags(name, spec) for name, spec in self.linears.items()}
        return frozenset(form for flags in combinations for form in _forms(*flags))

    def with_linears(self, changed: Mapping[str, LinearSpec]) -> Layout:
        """Return the same layout with these linears added or replaced."""
        return dataclasses.replace(self, linears={**self.linears, **changed})

    def packed(self, packing: Packing) -> Layout:
        """Return the same layout with every linear of the blocks packed."""
        return self.with_linears({name: spec.packed(packing) for name, spec in self.linears.items()})

    def with_tables_packed(self, packing: Packing) -> Layout:
        """Return the same layout with token embedding and head packed."""
        return dataclasses.replace(
            self,
            tables={name: spec.packed(packing) for name, spec in self.tables.items()},
        )

    @property
    def matrices(self) -> dict[str, LinearSpec]:
        """Return linears and tables together, by full name."""
        return {**self.linears, **self.tables}

    def tensors(self) -> dict[str, TensorSpec]:
        """Return every tensor of the file by its full name."""
        tensors = dict(self.others)
        parts = functools.cache(lambda spec: tuple(spec.tensors().items()))  # most linears have equal specs
        for name, spec in self.matrices.items():
            for part, tensor in parts(spec):
                tensors[f"{name}.{part}"] = tensor
        return tensors

    def size_bytes(self) -> int:
        """Return the exact size of the safetensors file."""
        return safetensors_bytes(self.tensors())

    def parameters(self) -> int:
        """Return the number of weights that the model computes with: a packed weight counts as one."""
        linear = sum(
            spec.out_features * (spec.in_features + int(spec.bias)) for spec in self.matrices.values()
        )
        return linear + sum(math.prod(tensor.shape) for tensor in self.others.values())

    def decode_macs(self) -> int:
        """Return the multiply-adds of the block linears per token: a stand-in for latency before any is measured."""
        return sum(spec.out_features * spec.in_features for spec in self.linears.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the record that `LAYOUT_FILE` stores; `from_dict` reads it."""
        return {
            "format": _FORMAT,
            "family": self.family.name,
            "task": self.task,
            "blocks": self.blocks,
            "head_width": self.head_width,
            "queries_per_key": self.queries_per_key,
            "linears": {name: _linear_record(spec) for name, spec in self.linears.items()},
            "others": {name: _tensor_record(spec) for name, spec in self.others.items()},
            "tables": {name: _linear_record(spec) for name, spec in self.tables.items()},
        }

    @staticmethod
    def read(artifact: Path) -> Layout:
        """Return the layout of an artifact's folder."""
        return Layout.from_dict(json.loads((artifact / LAYOUT_FILE).read_text())["layout"])

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Layout:
        """Return the layout of a record; raise ValueError if another format version wrote it."""
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"the artifact has layout format {record.get('format', 1)}, and this version of slimfront reads "
                f"format {_FORMAT}: compress the model again"
            )
        return Layout(
            family=family(record["family"]),
            task=record["task"],
            blocks=record["blocks"],
            head_width=record["head_width"],
            queries_per_key=record["queries_per_key"],
            linears={name: _linear_spec(linear) for name, linear in record["linears"].items()},
            others={name: _tensor_spec(tensor) for name, tensor in record["others"].items()},
            tables={name: _linear_spec(table) for name, table in record["tables"].items()},
        )


def safetensors_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Return the exact size of a safetensors file of these tensors: the header, padded to 8 bytes, and the data."""
    # safetensors orders tensors by type, the widest first, then by name.
    names_by_dtype: dict[str, list[str]] = {dtype: [] for dtype in _ITEM_BYTES}
    for name, tensor in tensors.items():
        names_by_dtype[tensor.dtype].append(name)
    header_entry = functools.cache(lambda tensor: (_header_entry(tensor), tensor.size_bytes))
    entries, end = ['{"__metadata__":{"format":"pt"}'], 0
    for name in itertools.chain.from_iterable(map(sorted, names_by_dtype.values())):
        entry, size = header_entry(tensors[name])
        start, end = end, end + size
        entries.append(f'{encode_basestring(name)}:{entry[:-1]},"data_offsets":[{start},{end}]}}')
    header = ",".join(entries) + "}"
    return 8 + math.ceil(len(header.encode()) / 8) * 8 + end


def _header_entry(tensor: TensorSpec) -> str:
    """Return the header's entry of a tensor, without its offsets."""
    return f'{{"dtype":"{tensor.dtype}","shape":[{",".join(map(str, tensor.shape))}]}}'


def _form_flags(name: str, spec: LinearSpec) -> tuple[bool, bool, bool]:
    """Return whether a linear of this full name is factored, packed, sparse."""
    return name.endswith((".u", ".v")), spec.packing is not None, spec.kept is not None


def _forms(factored: bool, packed: bool, sparse: bool) -> frozenset[Form]:
    forms: set[Form] = {"dense"}
    if factored:
        forms = {"factored"}
    if packed:
        forms.add("packed")
    if sparse:
        forms.add("sparse")
    return frozenset(forms)


# The keys of records are stored in artifacts: they stay as they are when a field is renamed.


def _tensor_record(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": spec.shape}


def _tensor_spec(record: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(record["dtype"], tuple(record["shape"]))


def _linear_record(spec: LinearSpec) -> dict[str, Any]:
    packing = None
    if spec.packing is not None:
        packing = dataclasses.asdict(spec.packing)
    return {
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "bias": spec.bias,
        "packing": packing,
        "kept": spec.kept,
    }


def _linear_spec(record: Mapping[str, Any]) -> LinearSpec:
    packing = None
    if record["packing"]:
        packing = Packing(**record["packing"])
    return LinearSpec(
        out_features=record["out_features"],
        in_features=record["in_features"],
        bias=record["bias"],
        packing=packing,
        kept=record.get("kept"),
    )
