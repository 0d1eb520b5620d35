"""The format `openvino`: OpenVINO's IR, a graph with an artifact's integers and scales as constants.

A causal model is stateful: the graph stores its KV cache, and its inputs are those that OpenVINO GenAI and Optimum
expect: input_ids, attention_mask (of all tokens so far), position_ids and beam_idx. Other models have the inputs
input_ids and attention_mask.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.formats import graph
from jobs.formats.openvino_constants import (
    NAME_PREFIX,
    StoredTensor,
    concatenated,
    constant_bytes,
    stored_tensors,
)
from jobs.models import loading, tokenizers
from jobs.models.layout import Layout
from jobs.runtimes.on_openvino import GRAPH, missing

__all__ = ["missing"]

WEIGHTS = "openvino_model.bin"
_ALIGNMENT = 8
"""Bytes: constants of the graph start at multiples of the widest type."""
_STRUCTURE_BYTES = 1024
"""Bytes reserved for constants that belong to the graph and not to the model (shapes, axes), so that the size of the
file follows from the model's shapes alone."""
_NARROW_TYPES = ("u8", "i8", "u4", "i4")
"""Types of at most a byte."""
_INTERFACE = ("input_ids", "attention_mask", "position_ids", "beam_idx", "logits", "last_hidden_state")
"""The inputs and outputs, whose names other programs use."""


def refusal(layout: Layout) -> str | None:
    return None


def size_bytes(layout: Layout, original: Path) -> int:
    sizes = [size for spec in layout.matrices.values() for size in constant_bytes(spec)]
    sizes += [tensor.size_bytes for tensor in graph.other_tensors(layout).values()]
    return _aligned(sum(sizes)) + _graph_constant_bytes(loading.computed_constant_bytes(original))


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    import openvino

    model = loading.load(artifact)
    network = _skeleton(artifact, cache)
    _fill(network, stored_tensors(model))
    if model.task == "causal-lm":
        network = _stateful(network)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        openvino.serialize(network, Path(scratch) / GRAPH)
        constants_bytes = _graph_constant_bytes(loading.computed_constant_bytes_of(model.module))
        _reorder(Path(scratch), out, constants_bytes)
    tokenizers.copy_tokenizer(artifact, out)
    shutil.copyfile(artifact / "config.json", out / "config.json")


def _graph_constant_bytes(computed: Sequence[int]) -> int:
    """Return the bytes reserved for constants of the graph. computed: sizes of masks and tables of sines."""
    return _STRUCTURE_BYTES + sum(map(_aligned, computed))


def _skeleton(artifact: Path, cache: Path | None) -> Any:
    """Return the graph of an artifact's shapes, with parameters instead of weights; equal shapes share a cached one."""
    import openvino

    if cache is None:
        return _traced(graph.function_of(artifact))
    folder = cache / "graphs"
    file = folder / f"openvino-{openvino.__version__.split('-')[0]}-{graph.structure_key(artifact)}.xml"
    if file.is_file():
        return openvino.Core().read_model(file)
    network = _traced(graph.function_of(artifact))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        draft = Path(scratch) / file.name
        openvino.serialize(network, draft)
        for suffix in (".bin", ".xml"):  # the .xml comes last: it marks a complete graph
            os.replace(draft.with_suffix(suffix), file.with_suffix(suffix))
    return network


def _traced(function: graph.Function) -> Any:
    """Return the function as an OpenVINO model, by TorchScript."""
    import openvino
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    script = graph.trace(function)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(script, example_input=function.arguments)
    network = frontend.convert(frontend.load(decoder))
    examples = {**function.inputs, **function.past, **function.weights}
    for node, (name, example) in zip(network.get_parameters(), examples.items(), strict=True):
        dynamic_axes: tuple[int, ...] = ()
        if name in function.past:
            dynamic_axes = (0, 2)
        elif name in function.inputs:
            dynamic_axes = (0, 1)
        shape = list(example.shape)
        for axis in dynamic_axes:
            shape[axis] = -1
        node.set_partial_shape(openvino.PartialShape(shape))
        if name not in function.inputs:
            node.set_element_type(openvino.Type.f32)
        _name(node, name)
    for node, name in zip(network.get_results(), (*function.outputs, *function.present), strict=True):
        node.set_friendly_name(name)
        node.input_value(0).get_tensor().set_names({name})
    network.validate_nodes_and_infer_types()
    apply_moc_transformations(network, cf=False)
    return network


def _name(node: Any, name: str) -> None:
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})


def _fill(network: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Replace the parameters of a graph that stand for weights by these tensors."""
    from openvino import opset13 as op

    nodes = {node.get_friendly_name(): node for node in network.get_parameters()}
    parameters = {name: node for name, node in nodes.items() if name in tensors}
    for names in _parallel_linears(parameters, tensors):
        # One product is faster than several with the same inputs.
        products = [_readers(parameters[name])[0].get_node() for name in names]
        joined = concatenated([tensors[name] for name in names])
        value = joined.value(joined.nodes(names[0]))
        product = op.matmul(products[0].input_value(0), value, False, True)
        rows = op.constant([tensors[name].shape[0] for name in names])
        for index, output in enumerate(op.variadic_split(product, op.constant(-1), rows).outputs()):
            for reader in products[index].output(0).get_target_inputs():
                reader.replace_source_output(output)
        for name in names:
            network.remove_parameter(parameters.pop(name))
    for name, parameter in parameters.items():
        constants = tensors[name].nodes(name)
        # Each reader unpacks the weight itself: OpenVINO would keep a shared unpacked weight in memory.
        for reader in _readers(parameter):
            reader.replace_source_output(tensors[name].value(constants).output(0))
        network.remove_parameter(parameter)


def _readers(node: Any) -> list[Any]:
    """Return the inputs that read a node's output, by type of operation."""
    return sorted(
        node.output(0).get_target_inputs(), key=lambda reader: str(reader.get_node().get_type_name())
    )


def _parallel_linears(parameters: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[list[str]]:
    """Return groups of linears that read the same input and are stored alike, so that one product can replace them."""
    groups: dict[Any, list[str]] = {}
    for name, node in parameters.items():
        readers = _readers(node)
        if len(readers) != 1 or not tensors[name].fills_bytes:
            continue
        product = readers[0].get_node()
        if product.get_type_name() != "MatMul":
            continue
        attributes = product.get_attributes()
        if attributes["transpose_a"] or not attributes["transpose_b"]:
            continue
        source = product.input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index(), tensors[name].kind)
        groups.setdefault(key, []).append(name)
    return [sorted(names) for names in groups.values() if len(names) > 1]


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _stateful(network: Any) -> Any:
    """Return the graph with the KV cache as a state, initially empty, whose rows beam_idx reorders at each step."""
    import openvino
    from openvino import opset13 as op
    from openvino.op.util import Variable, VariableInfo

    parameters = {node.get_friendly_name(): node for node in network.get_parameters()}
    results = {node.get_friendly_name(): node for node in network.get_results()}
    beams = op.parameter([-1], np.int32)
    _name(beams, "beam_idx")
    rows = op.gather(op.shape_of(parameters["input_ids"]), op.constant([0]), op.constant(0))
    sinks = []
    for name, past in parameters.items():
        if not name.startswith("past_key_values"):
            continue
        present = results.pop(name.replace("past", "present", 1))
        info = VariableInfo()
        info.data_shape, info.data_type = past.get_partial_shape(), past.get_element_type()
        info.variable_id = name + present.get_friendly_name()
        variable = Variable(info)
        heads, width = (past.get_partial_shape()[axis].get_length() for axis in (1, 3))
        empty = op.concat([rows, op.constant([heads]), op.constant([0]), op.constant([width])], 0)
        start = op.broadcast(op.constant(0.0, np.float32), empty)
        state = openvino.op.read_value(start, variable)
        reordered = op.gather(state, beams, op.constant(0))
        for reader in list(past.output(0).get_target_inputs()):
            reader.replace_source_output(reordered.output(0))
        sinks.append(openvino.op.assign(present.input_value(0).get_node(), variable))
    inputs = [node for name, node in parameters.items() if not name.startswith("past_key_values")]
    return openvino.Model(list(results.values()), sinks, [*inputs, beams], "slimfront")


def _reorder(scratch: Path, out: Path, constants_bytes: int) -> None:
    """Write a serialized graph with its constants in a fixed order and size.

    The file of weights has the model's tensors by name, then the constants of the graph, each once, padded to
    `constants_bytes` in all. Raises RuntimeError if the constants are larger.
    """
    serialized = np.memmap(scratch / WEIGHTS, np.uint8, "r")
    tree = ElementTree.parse(scratch / GRAPH)
    weights: list[tuple[bool, str, ElementTree.Element]] = []
    constants: list[ElementTree.Element] = []
    for layer in tree.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        name = layer.get("name", "")
        if name.startswith(NAME_PREFIX):
            weights.append((data.get("element_type") in _NARROW_TYPES, name, data))
        else:
            constants.append(data)
    offsets: dict[tuple[int, int], int] = {}
    with (out / WEIGHTS).open("wb") as file:
        # Types of two bytes come first, so that all their elements are aligned.
        for _, _, data in sorted(weights, key=lambda weight: weight[:2]):
            start, size = int(data.get("offset", 0)), int(data.get("size", 0))
            data.set("offset", str(file.tell()))
            file.write(serialized[start : start + size].data)
        file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
        end = file.tell() + constants_bytes
        for data in constants:
            start, size = int(data.get("offset", 0)), int(data.get("size", 0))
            if (start, size) not in offsets:
                offsets[start, size] = file.tell()
                file.write(serialized[start : start + size].tobytes().ljust(_aligned(size), b"\0"))
            data.set("offset", str(offsets[start, size]))
        if file.tell() > end:
            raise RuntimeError(
                f"the constants of the graph take {file.tell() - end} bytes more than the {constants_bytes} "
                f"predicted from the model's config"
            )
        file.write(b"\0" * (end - file.tell()))
    _rename_operations(tree)
    tree.write(out / GRAPH)


def _rename_operations(tree: Any) -> None:
    """Name operations by their ids in the graph.

    OpenVINO counts names through the process, so the same model would be written differently each time.
    """
    tree.getroot().set("name", "slimfront")
    for layer in tree.iter("layer"):
        if layer.get("type") != "Parameter" and not layer.get("name", "").startswith(NAME_PREFIX):
            layer.set("name", f"{layer.get('type')}_{layer.get('id')}")
    for info in tree.iter("rt_info"):
        fused_names = [entry for entry in info if entry.get("name") == "fused_names"]
        for entry in fused_names:
            info.remove(entry)
    for port in tree.iter("port"):
        if "names" in port.attrib and port.get("names") not in _INTERFACE:
            del port.attrib["names"]
