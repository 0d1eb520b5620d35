"""Simplify how an ONNX graph computes sizes: read each dynamic size once, instead of in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZE = "size/"
"""Prefix of the names of shared sizes: the name or the number of the size follows."""


def share_sizes(model: Any, sizes: Mapping[str, tuple[str, int]]) -> Any:
    """Modify a model in place so that it computes each size of a tensor once, and return it.

    Static sizes become constants; a dynamic size in `sizes` is read from an input. sizes: for each name of a dynamic
    size, the input and the axis that have it. ONNX Runtime recognizes equal computations on equal sizes and does them
    once; without this, three of five nodes of a decoder compute sizes.
    """
    from onnx import shape_inference

    while True:
        # Each round gives slices a known width, so that the next round knows more shapes.
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
        renamed = _size_values(model.graph, shapes, sizes)
        if not renamed:
            return model
        _rewrite(model.graph, renamed, sizes)


def _size_values(
    graph: Any, shapes: Mapping[str, Any], sizes: Mapping[str, tuple[str, int]]
) -> dict[str, str]:
    """Return the values that are one size of a tensor, each with the name of the shared size."""
    from onnx import numpy_helper

    measured = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape" and not node.attribute
    }
    axes = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    renamed = {}
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in measured or node.input[1] not in axes:
            continue
        shape, axis = shapes.get(measured[node.input[0]], ()), axes[node.input[1]]
        if axis.ndim or not -len(shape) <= axis < len(shape):
            continue
        size = shape[int(axis)]
        if size.HasField("dim_value") or size.dim_param in sizes:
            renamed[node.output[0]] = _SIZE + (size.dim_param or str(size.dim_value))
    return renamed


def _rewrite(graph: Any, renamed: Mapping[str, str], sizes: Mapping[str, tuple[str, int]]) -> None:
    """Read sizes by their new names, compute them at the start of the graph, and drop nodes that nothing reads."""
    nodes = [node for node in graph.node if node.output[0] not in renamed]
    for node in nodes:
        inputs = [renamed.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
    computed = {name for node in nodes for name in node.output}
    size_nodes: list[Any] = []
    for name in sorted(set(renamed.values()) - computed):
        size_nodes += _size_nodes(name.removeprefix(_SIZE), name, sizes)
    needed = {value.name for value in graph.output}
    needed_nodes = []
    for node in reversed([*size_nodes, *nodes]):
        if needed.intersection(node.output):
            needed.update(node.input)
            needed_nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(reversed(needed_nodes))
    graph.ClearField("value_info")


def _size_nodes(size: str, name: str, sizes: Mapping[str, tuple[str, int]]) -> list[Any]:
    """Return the nodes that compute a size, a number or a name of `sizes`, as the value `name`."""
    from onnx import TensorProto, helper

    if size not in sizes:
        number = helper.make_tensor(name, TensorProto.INT64, [], [int(size)])
        return [helper.make_node("Constant", [], [name], value=number)]
    tensor, axis = sizes[size]
    return [
        helper.make_node("Shape", [tensor], [f"{name}/alone"], start=axis, end=axis + 1),
        helper.make_node("Squeeze", [f"{name}/alone"], [name]),
    ]
