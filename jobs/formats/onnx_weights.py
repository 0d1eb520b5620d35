"""Filling: an ONNX graph's parameters become tensors of a file, packed ones for operators that read them so."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.formats import onnx_blocks
from jobs.models.layers import PackedEmbedding, PackedLinear
from jobs.models.layout import LinearSpec
from jobs.models.model import written_dtype

INLINE_BYTES = 1024
"""Larger constants of the graph's own (masks, tables of sines) lie in the file, weighed with the weights."""
_ALIGNMENT = 64
"""Each tensor starts at a multiple of it, a cache line, in the file, which runtimes map."""
_ACCURACY = 4
"""How MatMulNBits multiplies: it rounds what it reads to 8 bits, a scale to each block, as llama.cpp does too. Where it
does not, ONNX Runtime 1.31 unpacks 2 and 8 bits anew at every token, which takes 60 times as long."""
_RUNTIMES_OWN = "com.microsoft"
_GEMM = {"alpha": 1.0, "beta": 1.0, "transB": 1}
_KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT", torch.int64: "INT64",
          torch.int32: "INT32", torch.uint8: "UINT8", torch.int8: "INT8"}  # fmt: skip


@dataclass(frozen=True)
class _View:
    """Bytes of the file, by the name that they are held under, as a tensor of the graph; kind: ONNX's number of it."""

    held: str
    kind: int
    shape: tuple[int, ...]


class OnnxWeightWriter:
    """A graph on its way from parameters to tensors: what the file will hold, and the nodes that read it."""

    def __init__(self, model: Any) -> None:
        nodes = [part for node in model.graph.node for part in _without_gemm(node)]
        self.parameters = frozenset(one.name for one in model.graph.input)
        self._model = model
        self._filled: set[str] = set()
        self._held: dict[str, bytes] = {}
        self._views: dict[str, _View] = {}
        self._first: dict[str, Any] = {}  # what makes values of tensors, by the name of the values
        self._places = [[node] for node in nodes]  # what stands in the place of each node
        self._makers = {name: node for node in nodes for name in node.output}
        self._readers: dict[str, list[int]] = {}
        for at, node in enumerate(nodes):
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(at)

    def put_dense(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor in the dtype that artifacts have it in, for all who read the parameter of this name."""
        self._filled.add(name)
        self._hold(name, tensor.detach().to(written_dtype(tensor)))
        if not tensor.is_floating_point():
            return
        for at in self._readers.get(name, []):
            (node,) = self._places[at]
            if node.op_type == "Gather" and node.input[0] == name:  # of a table only rows looked up are cast
                values, node.output[0] = node.output[0], f"{node.output[0]}/held"
                self._places[at] = [node, _node("Cast", [node.output[0]], values, to=_kind("FLOAT"))]
            else:
                given = [self._float(name) if one == name else one for one in node.input]
                del node.input[:]
                node.input.extend(given)

    def put_packed(self, name: str, layer: PackedLinear | PackedEmbedding) -> None:
        """Hold a packed weight, and multiply by it or look up its rows where the parameter of this name is read."""
        self._filled.add(name)
        stem = name.removesuffix("weight")
        for part, tensor in onnx_blocks.block_tensors(layer).items():
            self._hold(stem + part, tensor)
        for at in self._readers.get(name, []):
            (node,) = self._places[at]
            if node.op_type == "Gather":
                self._places[at] = self._rows(stem, layer.spec, node)
                continue
            products = self._readers[node.output[0]]
            if node.op_type != "Transpose" or {self._places[one][0].op_type for one in products} != {
                "MatMul"
            }:
                raise RuntimeError(f"{name} is read by {node.op_type}: neither a product nor a table")
            self._places[at] = []
            for one in products:
                (product,) = self._places[one]
                made = self._of_integers if onnx_blocks.rounds_inputs(layer.spec) else self._of_blocks
                self._places[one] = made(stem, layer.spec, product.input[0], product.output[0])

    def finish(self, file: Path, room: int) -> None:
        """Put the graph together, and write the tensors one by one, by name, then the large ones of the graph's own,
        each once, filled up to their fixed room."""
        weights = sorted(self._held)
        kept = [node for place in self._places for node in place if not self._taken_out(node)]
        own = sorted(self._held.keys() - set(weights))
        places: dict[str, int] = {}
        with file.open("wb") as stream:
            end = sum(aligned(len(self._held[name])) for name in weights) + room
            for name in (*weights, *own):
                places[name] = stream.tell()
                stream.write(self._held[name].ljust(aligned(len(self._held[name])), b"\0"))
            if stream.tell() > end:
                raise RuntimeError(
                    f"the graph's own constants take {stream.tell() - end} bytes more than the {room} foreseen"
                )
            stream.write(b"\0" * (end - stream.tell()))
        self._assemble(kept, file.name, places)

    def _assemble(self, nodes: list[Any], file: str, places: dict[str, int]) -> None:
        from onnx import TensorProto, helper

        network = self._model.graph
        given = [one for one in network.input if one.name not in self._filled]
        for field, values in (("node", [*self._first.values(), *nodes]), ("input", given)):
            network.ClearField(field)
            getattr(network, field).extend(values)
        for name, view in self._views.items():
            tensor = TensorProto(
                name=name, data_type=view.kind, dims=view.shape, data_location=TensorProto.EXTERNAL
            )
            where = {
                "location": file, "offset": str(places[view.held]), "length": str(len(self._held[view.held]))
            }  # fmt: skip
            for key, value in where.items():
                tensor.external_data.add(key=key, value=value)
            network.initializer.append(tensor)
        self._model.opset_import.append(helper.make_opsetid(_RUNTIMES_OWN, 1))

    def _taken_out(self, node: Any) -> bool:
        """Whether a node is a large constant, which the file holds from now on."""
        if node.op_type != "Constant" or len(node.attribute[0].t.raw_data) <= INLINE_BYTES:
            return False
        tensor = node.attribute[0].t
        held = f"constants/{hashlib.sha256(tensor.raw_data).hexdigest()}"
        self._held[held] = tensor.raw_data
        self._views[node.output[0]] = _View(held, tensor.data_type, tuple(tensor.dims))
        return True

    def _rows(self, stem: str, spec: LinearSpec, node: Any) -> list[Any]:
        cut = onnx_blocks.blocks_of(spec)
        table = self._seen(f"{stem}packed", f"{stem}rows", (spec.out_features, cut.row_bytes))
        given = [table, node.input[1], self._float(f"{stem}scales")]
        given += [f"{stem}zeros"] if f"{stem}zeros" in self._held else []
        about = {"bits": cut.bits, "block_size": cut.size, "gather_axis": 0, "quantize_axis": 1}
        values = node.output[0]
        if cut.size * cut.number == spec.in_features:
            return [_node("GatherBlockQuantized", given, values, **about)]
        ends = [self._whole(one) for one in (0, spec.in_features, -1)]
        return [
            _node("GatherBlockQuantized", given, f"{values}/filled", **about),
            _node("Slice", [f"{values}/filled", *ends], values),
        ]

    def _of_blocks(self, stem: str, spec: LinearSpec, x: str, y: str) -> list[Any]:
        """y = x Wᵀ. No fast operator knows real zero points z, so they are taken out of the product:
        W = s (q − z) = s (q − m) + s (m − z) with m the middle; the second part meets only the sum of each block."""
        cut = onnx_blocks.blocks_of(spec)
        shape = (spec.out_features, cut.number, cut.size * cut.bits // 8)
        given = [x, self._seen(f"{stem}packed", f"{stem}blocks", shape), self._float(f"{stem}scales")]
        about = {"K": spec.in_features, "N": spec.out_features, "bits": cut.bits, "block_size": cut.size,
                 "accuracy_level": _ACCURACY}  # fmt: skip
        assert spec.packing is not None
        if not spec.packing.real_zeros:
            given += [] if spec.packing.symmetric else [f"{stem}zeros"]
            return [_node("MatMulNBits", given, y, **about)]
        middle = self._make("Cast", [self._whole(2 ** (cut.bits - 1))], f"{stem}middle", to=_kind("FLOAT"))
        shifts = self._make("Sub", [middle, self._float(f"{stem}zeros")], f"{stem}shifts")
        shifts = self._make("Mul", [shifts, self._float(f"{stem}scales")], f"{stem}shifts/scaled")
        shifts = self._make("Transpose", [shifts], f"{stem}shifts/columns", perm=[1, 0])
        return [
            _node("MatMulNBits", given, f"{y}/centred", **about),
            _node("MatMul", [x, self._summing(cut, spec.in_features)], f"{y}/sums"),
            _node("MatMul", [f"{y}/sums", shifts], f"{y}/shift"),
            _node("Add", [f"{y}/centred", f"{y}/shift"], y),
        ]

    def _summing(self, cut: onnx_blocks.Blocks, width: int) -> str:
        """The matrix [width, blocks] of zeros and ones that x is multiplied by for the sum of each block."""
        stem = f"sums/{width}/{cut.size}"
        square = self._make("ConstantOfShape", [self._whole(cut.number, cut.number)], f"{stem}/square")
        ones = self._make("EyeLike", [square], f"{stem}/ones", dtype=_kind("FLOAT"))
        ones = self._make("Unsqueeze", [ones, self._whole(1)], f"{stem}/apart")
        ones = self._make("Expand", [ones, self._whole(cut.number, cut.size, cut.number)], f"{stem}/repeated")
        ones = self._make("Reshape", [ones, self._whole(-1, cut.number)], f"{stem}/filled")
        return self._make("Slice", [ones, *(self._whole(one) for one in (0, width, 0))], f"{stem}/matrix")

    def _of_integers(self, stem: str, spec: LinearSpec, x: str, y: str) -> list[Any]:
        """y = x Wᵀ where x is whole numbers times one step for each token: integers multiply integers."""
        scaled = self._makers[x]
        whole, steps = scaled.input
        if scaled.op_type != "Mul" or self._makers[whole].op_type != "Round":
            raise RuntimeError(f"{stem}weight meets rounded inputs, and the graph does not round them")
        weight = self._make("Transpose", [f"{stem}packed"], f"{stem}columns", perm=[1, 0])
        scales = self._make("Transpose", [self._float(f"{stem}scales")], f"{stem}scales/columns", perm=[1, 0])
        return [
            _node("Cast", [whole], f"{y}/whole", to=_kind("INT8")),
            _node("MatMulInteger", [f"{y}/whole", weight], f"{y}/integers"),
            _node("Cast", [f"{y}/integers"], f"{y}/floats", to=_kind("FLOAT")),
            _node("Mul", [f"{y}/floats", steps], f"{y}/scaled"),
            _node("Mul", [f"{y}/scaled", scales], y),
        ]

    def _hold(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._views[name] = _View(name, _kind(_KINDS[tensor.dtype]), tuple(tensor.shape))

    def _seen(self, held: str, name: str, shape: tuple[int, ...]) -> str:
        """The name of bytes that are held, in another shape."""
        self._views.pop(held, None)
        self._views[name] = _View(held, _kind("UINT8"), shape)
        return name

    def _float(self, name: str) -> str:
        """The name of a tensor's values in fp32. ONNX Runtime computes what depends on tensors alone once, when it
        loads the graph."""
        return self._make("Cast", [name], f"{name}/fp32", to=_kind("FLOAT"))

    def _whole(self, *values: int) -> str:
        """The name of these whole numbers."""
        from onnx import TensorProto, helper

        name = f"whole/{'_'.join(map(str, values))}"
        return self._make(
            "Constant", [], name, value=helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        )

    def _make(self, operator: str, given: list[str], name: str, **about: Any) -> str:
        self._first.setdefault(name, _node(operator, given, name, **about))
        return name


def aligned(size: int) -> int:
    """What so many bytes take in the file."""
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _kind(name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))


def _node(operator: str, given: list[str], gives: str, **about: Any) -> Any:
    from onnx import helper

    domain = _RUNTIMES_OWN if operator in ("MatMulNBits", "GatherBlockQuantized") else ""
    return helper.make_node(operator, given, [gives], domain=domain, name=gives, **about)


def _without_gemm(node: Any) -> list[Any]:
    """A product of rows with a bias, as the exporter writes it, as the transpose, product and sum that others are."""
    if node.op_type != "Gemm":
        return [node]
    from onnx import helper

    if {one.name: helper.get_attribute_value(one) for one in node.attribute} != _GEMM:
        raise RuntimeError(f"{node.name} is another Gemm than those of linears")
    x, weight, bias = node.input
    y = node.output[0]
    return [
        _node("Transpose", [weight], f"{y}/columns", perm=[1, 0]),
        _node("MatMul", [x, f"{y}/columns"], f"{y}/product"),
        _node("Add", [f"{y}/product", bias], y),
    ]
