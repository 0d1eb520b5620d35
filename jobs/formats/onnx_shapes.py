"""Shapes: an ONNX graph asks for each size once, and not in every block of a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZE = "size/"


def share_sizes(model: Any, sizes: Mapping[str, tuple[str, int]]) -> Any:
    """The model with sizes of tensors written out where they are numbers, and asked of an input where they are among
    `sizes`: of each name the input and the axis that have it.

    ONNX Runtime sees equal computations of equal sizes, and does them once. Before, three of five nodes of a decoder
    computed sizes.
    """
    from onnx import shape_inference

    while True:
        # A round makes slices of known width, whose shapes the next one knows.
        known = shape_inference.infer_shapes(model, data_prop=True).graph
        told = {
            one.name: one.type.tensor_type.shape.dim
            for one in (*known.value_info, *known.input, *known.output)
        }
        renamed = _askers(model.graph, told, sizes)
        if not renamed:
            return model
        _rewrite(model.graph, renamed, sizes)


def _askers(graph: Any, told: Mapping[str, Any], sizes: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """The values that are one size of a tensor, and what that is called: its name or its number."""
    from onnx import numpy_helper

    asked = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape" and not node.attribute
    }
    axes = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    found = {}
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in asked or node.input[1] not in axes:
            continue
        shape, axis = told.get(asked[node.input[0]], ()), axes[node.input[1]]
        if axis.ndim or not -len(shape) <= axis < len(shape):
            continue
        size = shape[int(axis)]
        if size.HasField("dim_value") or size.dim_param in sizes:
            found[node.output[0]] = _SIZE + (size.dim_param or str(size.dim_value))
    return found


def _rewrite(graph: Any, renamed: Mapping[str, str], sizes: Mapping[str, tuple[str, int]]) -> None:
    """Read the sizes by their new names, made at the start of the graph, and drop nodes that nothing reads any more."""
    nodes = [node for node in graph.node if node.output[0] not in renamed]
    for node in nodes:
        given = [renamed.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(given)
    made = {name for node in nodes for name in node.output}
    first = [
        part
        for name in sorted(set(renamed.values()) - made)
        for part in _size(name.removeprefix(_SIZE), name, sizes)
    ]
    needed = {one.name for one in graph.output}
    kept = []
    for node in reversed([*first, *nodes]):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    graph.ClearField("node")
    graph.node.extend(reversed(kept))
    graph.ClearField("value_info")


def _size(what: str, name: str, sizes: Mapping[str, tuple[str, int]]) -> list[Any]:
    from onnx import TensorProto, helper

    if what not in sizes:
        number = helper.make_tensor(name, TensorProto.INT64, [], [int(what)])
        return [helper.make_node("Constant", [], [name], value=number)]
    given, axis = sizes[what]
    return [
        helper.make_node("Shape", [given], [f"{name}/alone"], start=axis, end=axis + 1),
        helper.make_node("Squeeze", [f"{name}/alone"], [name]),
    ]
