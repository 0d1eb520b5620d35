"""Replace the parameters of an ONNX graph by tensors of a file, and their readers by operators that unpack."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
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
"""Constants of the graph (masks, tables of sines) up to this size stay in it; larger ones are written to the file of
the weights and count towards its size."""
_ALIGNMENT = 64
"""Bytes: each tensor starts at a multiple of a cache line in the file, which runtimes map into memory."""
_ACCURACY = 4
"""MatMulNBits rounds its inputs to 8 bits with a scale per block, as llama.cpp does. At other levels ONNX Runtime 1.31
unpacks 2 and 8 bits again at every token, which takes 60 times as long."""
_MICROSOFT_DOMAIN = "com.microsoft"
_MICROSOFT_OPERATORS = ("MatMulNBits", "GatherBlockQuantized")
_LINEAR_GEMM = {"alpha": 1.0, "beta": 1.0, "transB": 1}
"""Attributes of the Gemm that the exporter writes for a linear with a bias."""
_TYPE_NAMES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT", torch.int64: "INT64",
               torch.int32: "INT32", torch.uint8: "UINT8", torch.int8: "INT8"}  # fmt: skip


@dataclass(frozen=True)
class _View:
    """A tensor of the graph whose bytes are in the file."""

    stored: str
    """Name of the bytes in the file."""
    type_id: int
    """ONNX's number of the element type."""
    shape: tuple[int, ...]


class OnnxWeightWriter:
    """Fills the parameters of an ONNX graph: collects the bytes of the file and the nodes that read them.

    Call `put_dense` or `put_packed` for every parameter that is a weight, then `finish`.
    """

    def __init__(self, model: Any) -> None:
        """model: an ONNX model whose weights are inputs of the graph; `finish` modifies it in place."""
        nodes: list[Any] = []
        for node in model.graph.node:
            nodes += _without_gemm(node)
        self.parameters = frozenset(value.name for value in model.graph.input)
        self._model = model
        self._filled: set[str] = set()
        self._stored: dict[str, bytes] = {}
        self._views: dict[str, _View] = {}
        self._weight_nodes: dict[str, Any] = {}
        """Nodes that depend on weights alone, by the name of their output."""
        self._replacements = [[node] for node in nodes]
        """The nodes that take the place of each original node."""
        self._producers = {name: node for node in nodes for name in node.output}
        self._readers: dict[str, list[int]] = {}
        """Indices of the nodes that read each value."""
        for index, node in enumerate(nodes):
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(index)

    def put_dense(self, name: str, tensor: Tensor) -> None:
        """Store a tensor in the type that artifacts have, and cast it to fp32 where the parameter `name` is read."""
        self._filled.add(name)
        self._store(name, tensor.detach().to(written_dtype(tensor)))
        if not tensor.is_floating_point():
            return
        for index in self._readers.get(name, []):
            (node,) = self._replacements[index]
            if node.op_type == "Gather" and node.input[0] == name:  # of a table, cast only the rows looked up
                values, node.output[0] = node.output[0], f"{node.output[0]}/held"
                self._replacements[index] = [
                    node,
                    _node("Cast", [node.output[0]], values, to=_type_id("FLOAT")),
                ]
            else:
                inputs = list(node.input)
                for position, input_name in enumerate(inputs):
                    if input_name == name:
                        inputs[position] = self._float(name)
                del node.input[:]
                node.input.extend(inputs)

    def put_packed(self, name: str, layer: PackedLinear | PackedEmbedding) -> None:
        """Store a packed weight, and replace the products and lookups that read the parameter `name`."""
        self._filled.add(name)
        stem = name.removesuffix("weight")
        for part, tensor in onnx_blocks.block_tensors(layer).items():
            self._store(stem + part, tensor)
        for index in self._readers.get(name, []):
            (node,) = self._replacements[index]
            if node.op_type == "Gather":
                self._replacements[index] = self._lookup(stem, layer.spec, node)
                continue
            products = self._readers[node.output[0]]
            operators = {self._replacements[product][0].op_type for product in products}
            if node.op_type != "Transpose" or operators != {"MatMul"}:
                raise RuntimeError(
                    f"{name} is read by {node.op_type}; expected the product of a linear or a lookup in a table"
                )
            self._replacements[index] = []
            for product_index in products:
                (product,) = self._replacements[product_index]
                x, y = product.input[0], product.output[0]
                if onnx_blocks.rounds_inputs(layer.spec):
                    self._replacements[product_index] = self._integer_product(stem, layer.spec, x, y)
                else:
                    self._replacements[product_index] = self._block_product(stem, layer.spec, x, y)

    def finish(self, file: Path, constants_bytes: int) -> None:
        """Write the file and complete the graph.

        The file has the weights by name, then the large constants of the graph, each once, padded to
        `constants_bytes` in all. Raises RuntimeError if the constants are larger.
        """
        weights = sorted(self._stored)
        nodes: list[Any] = []
        for replacement in self._replacements:
            nodes += [node for node in replacement if not self._move_constant(node)]
        constants = sorted(self._stored.keys() - set(weights))
        offsets: dict[str, int] = {}
        with file.open("wb") as stream:
            end = sum(aligned(len(self._stored[name])) for name in weights) + constants_bytes
            for name in (*weights, *constants):
                offsets[name] = stream.tell()
                stream.write(self._stored[name].ljust(aligned(len(self._stored[name])), b"\0"))
            if stream.tell() > end:
                raise RuntimeError(
                    f"the constants of the graph take {stream.tell() - end} bytes more than the {constants_bytes} "
                    f"predicted from the model's config"
                )
            stream.write(b"\0" * (end - stream.tell()))
        self._assemble(nodes, file.name, offsets)

    def _assemble(self, nodes: Sequence[Any], file: str, offsets: Mapping[str, int]) -> None:
        from onnx import TensorProto, helper

        network = self._model.graph
        inputs = [value for value in network.input if value.name not in self._filled]
        for field, values in (("node", [*self._weight_nodes.values(), *nodes]), ("input", inputs)):
            network.ClearField(field)
            getattr(network, field).extend(values)
        for name, view in self._views.items():
            tensor = TensorProto(
                name=name, data_type=view.type_id, dims=view.shape, data_location=TensorProto.EXTERNAL
            )
            location = {
                "location": file,
                "offset": str(offsets[view.stored]),
                "length": str(len(self._stored[view.stored])),
            }
            for key, value in location.items():
                tensor.external_data.add(key=key, value=value)
            network.initializer.append(tensor)
        self._model.opset_import.append(helper.make_opsetid(_MICROSOFT_DOMAIN, 1))

    def _move_constant(self, node: Any) -> bool:
        """Move a large constant from the graph to the file; return whether the node was one."""
        if node.op_type != "Constant" or len(node.attribute[0].t.raw_data) <= INLINE_BYTES:
            return False
        tensor = node.attribute[0].t
        stored = f"constants/{hashlib.sha256(tensor.raw_data).hexdigest()}"
        self._stored[stored] = tensor.raw_data
        self._views[node.output[0]] = _View(stored, tensor.data_type, tuple(tensor.dims))
        return True

    def _lookup(self, stem: str, spec: LinearSpec, node: Any) -> list[Any]:
        """Return the nodes that look up rows of a packed table in place of the Gather `node`."""
        blocks = onnx_blocks.blocks_of(spec)
        table = self._reshaped(f"{stem}packed", f"{stem}rows", (spec.out_features, blocks.row_bytes))
        inputs = [table, node.input[1], self._float(f"{stem}scales")]
        if f"{stem}zeros" in self._stored:
            inputs.append(f"{stem}zeros")
        attributes = {"bits": blocks.bits, "block_size": blocks.size, "gather_axis": 0, "quantize_axis": 1}
        rows = node.output[0]
        if blocks.size * blocks.number == spec.in_features:
            return [_node("GatherBlockQuantized", inputs, rows, **attributes)]
        bounds = [self._integers(value) for value in (0, spec.in_features, -1)]
        return [
            _node("GatherBlockQuantized", inputs, f"{rows}/filled", **attributes),
            _node("Slice", [f"{rows}/filled", *bounds], rows),
        ]

    def _block_product(self, stem: str, spec: LinearSpec, x: str, y: str) -> list[Any]:
        """Return the nodes of y = x Wᵀ.

        No fast operator supports real zero points z, so W = s (q − z) is computed as s (q − m) + s (m − z), where m is
        the middle integer; the second term multiplies only the sum of each block of x.
        """
        assert spec.packing is not None
        blocks = onnx_blocks.blocks_of(spec)
        shape = (spec.out_features, blocks.number, blocks.size * blocks.bits // 8)
        inputs = [x, self._reshaped(f"{stem}packed", f"{stem}blocks", shape), self._float(f"{stem}scales")]
        attributes = {
            "K": spec.in_features,
            "N": spec.out_features,
            "bits": blocks.bits,
            "block_size": blocks.size,
            "accuracy_level": _ACCURACY,
        }
        if not spec.packing.real_zeros:
            if not spec.packing.symmetric:
                inputs.append(f"{stem}zeros")
            return [_node("MatMulNBits", inputs, y, **attributes)]
        middle = self._integers(2 ** (blocks.bits - 1))
        middle = self._weight_node("Cast", [middle], f"{stem}middle", to=_type_id("FLOAT"))
        shifts = self._weight_node("Sub", [middle, self._float(f"{stem}zeros")], f"{stem}shifts")
        shifts = self._weight_node("Mul", [shifts, self._float(f"{stem}scales")], f"{stem}shifts/scaled")
        shifts = self._weight_node("Transpose", [shifts], f"{stem}shifts/columns", perm=[1, 0])
        return [
            _node("MatMulNBits", inputs, f"{y}/centred", **attributes),
            _node("MatMul", [x, self._summing_matrix(blocks, spec.in_features)], f"{y}/sums"),
            _node("MatMul", [f"{y}/sums", shifts], f"{y}/shift"),
            _node("Add", [f"{y}/centred", f"{y}/shift"], y),
        ]

    def _summing_matrix(self, blocks: onnx_blocks.Blocks, width: int) -> str:
        """Return the name of the matrix [width, blocks] of zeros and ones whose product with x sums each block."""
        stem = f"sums/{width}/{blocks.size}"
        square = self._integers(blocks.number, blocks.number)
        square = self._weight_node("ConstantOfShape", [square], f"{stem}/square")
        ones = self._weight_node("EyeLike", [square], f"{stem}/ones", dtype=_type_id("FLOAT"))
        ones = self._weight_node("Unsqueeze", [ones, self._integers(1)], f"{stem}/apart")
        repeated = self._integers(blocks.number, blocks.size, blocks.number)
        ones = self._weight_node("Expand", [ones, repeated], f"{stem}/repeated")
        ones = self._weight_node("Reshape", [ones, self._integers(-1, blocks.number)], f"{stem}/filled")
        bounds = [self._integers(value) for value in (0, width, 0)]
        return self._weight_node("Slice", [ones, *bounds], f"{stem}/matrix")

    def _integer_product(self, stem: str, spec: LinearSpec, x: str, y: str) -> list[Any]:
        """Return the nodes of y = x Wᵀ for x that the graph rounds to integers times one scale per token."""
        scaled = self._producers[x]
        rounded, steps = scaled.input
        if scaled.op_type != "Mul" or self._producers[rounded].op_type != "Round":
            raise RuntimeError(f"{stem}weight expects rounded inputs, and the graph does not round them")
        weight = self._weight_node("Transpose", [f"{stem}packed"], f"{stem}columns", perm=[1, 0])
        scales = self._float(f"{stem}scales")
        scales = self._weight_node("Transpose", [scales], f"{stem}scales/columns", perm=[1, 0])
        return [
            _node("Cast", [rounded], f"{y}/whole", to=_type_id("INT8")),
            _node("MatMulInteger", [f"{y}/whole", weight], f"{y}/integers"),
            _node("Cast", [f"{y}/integers"], f"{y}/floats", to=_type_id("FLOAT")),
            _node("Mul", [f"{y}/floats", steps], f"{y}/scaled"),
            _node("Mul", [f"{y}/scaled", scales], y),
        ]

    def _store(self, name: str, tensor: Tensor) -> None:
        self._stored[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._views[name] = _View(name, _type_id(_TYPE_NAMES[tensor.dtype]), tuple(tensor.shape))

    def _reshaped(self, stored: str, name: str, shape: tuple[int, ...]) -> str:
        """View stored bytes in another shape as the tensor `name`, and return this name."""
        self._views.pop(stored, None)
        self._views[name] = _View(stored, _type_id("UINT8"), shape)
        return name

    def _float(self, name: str) -> str:
        """Return the name of a stored tensor's values in fp32.

        ONNX Runtime computes nodes that depend on weights alone once, when it loads the graph.
        """
        return self._weight_node("Cast", [name], f"{name}/fp32", to=_type_id("FLOAT"))

    def _integers(self, *values: int) -> str:
        """Return the name of an int64 constant of these values."""
        from onnx import TensorProto, helper

        name = f"whole/{'_'.join(map(str, values))}"
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return self._weight_node("Constant", [], name, value=tensor)

    def _weight_node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node that depends on weights alone, once for each name, and return the name of its output."""
        self._weight_nodes.setdefault(name, _node(operator, inputs, name, **attributes))
        return name


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in the file."""
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _type_id(name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    from onnx import helper

    domain = ""
    if operator in _MICROSOFT_OPERATORS:
        domain = _MICROSOFT_DOMAIN
    return helper.make_node(operator, inputs, [output], domain=domain, name=output, **attributes)


def _without_gemm(node: Any) -> list[Any]:
    """Split the Gemm of a linear with a bias into Transpose, MatMul and Add; return other nodes as they are."""
    if node.op_type != "Gemm":
        return [node]
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes != _LINEAR_GEMM:
        raise RuntimeError(f"{node.name} is a Gemm with {attributes}; that of a linear has {_LINEAR_GEMM}")
    x, weight, bias = node.input
    y = node.output[0]
    return [
        _node("Transpose", [weight], f"{y}/columns", perm=[1, 0]),
        _node("MatMul", [x, f"{y}/columns"], f"{y}/product"),
        _node("Add", [f"{y}/product", bias], y),
    ]
