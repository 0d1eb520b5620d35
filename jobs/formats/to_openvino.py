"""The format `openvino`: OpenVINO's IR, a graph with an artifact's own integers and scales in it.

A causal model is stateful, its KV cache is the graph's own, and its inputs are those that OpenVINO GenAI and Optimum
expect: input_ids, attention_mask (of all tokens so far), position_ids and beam_idx. Others take input_ids and
attention_mask.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jobs.formats import graph
from jobs.models import loading, tokenizers
from jobs.models.bit_packing import pack, unpack
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear
from jobs.models.layout import Layout, LinearSpec, Packing
from jobs.models.model import Model, distinct_tensors, written_dtype
from jobs.runtimes.on_openvino import GRAPH, missing

__all__ = ["missing"]

WEIGHTS = "openvino_model.bin"
_ALIGNMENT = 8
"""The graph's own constants start at multiples of it, the width of the widest."""
_STRUCTURE_BYTES = 1024
"""Room for what belongs to the graph and not to the model (shapes, axes), so that the size follows from the model's
shapes alone."""
_NARROW = ("u8", "i8", "u4", "i4")
"""Types of a byte or less."""
_NAMED = ("input_ids", "attention_mask", "position_ids", "beam_idx", "logits", "last_hidden_state")
"""The inputs and outputs, which have names that others ask for."""
_OWN = "slimfront/"
"""Stands before the names of the constants that hold the model's tensors."""


def refusal(layout: Layout) -> str | None:
    return None


def size_bytes(layout: Layout, original: Path) -> int:
    sizes = [size for spec in layout.matrices.values() for size in _bytes_of(spec)]
    sizes += [tensor.size_bytes for tensor in graph.other_tensors(layout).values()]
    return _aligned(sum(sizes)) + _structure_bytes(loading.computed_constant_bytes(original))


def _structure_bytes(computed: Sequence[int]) -> int:
    """Room for the constants of a graph, those that the family's code computes included: masks, tables of sines."""
    return _STRUCTURE_BYTES + sum(map(_aligned, computed))


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    import openvino

    model = loading.load(artifact)
    network = _skeleton(artifact, cache)
    _fill(network, _held(model))
    if model.task == "causal-lm":
        network = _stateful(network)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        openvino.serialize(network, Path(scratch) / GRAPH)
        _lay_out(Path(scratch), out, _structure_bytes(loading.computed_constant_bytes_of(model.module)))
    tokenizers.copy_tokenizer(artifact, out)
    shutil.copyfile(artifact / "config.json", out / "config.json")


def _skeleton(artifact: Path, cache: Path | None) -> Any:
    """The graph of an artifact's shape, with parameters in the places of weights; kept for others of this shape."""
    import openvino

    kept = None if cache is None else cache / "graphs"
    name = f"openvino-{openvino.__version__.split('-')[0]}-{graph.structure_key(artifact)}.xml"
    if kept is not None and (kept / name).is_file():
        return openvino.Core().read_model(kept / name)
    network = _traced(graph.function_of(artifact))
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            openvino.serialize(network, Path(scratch) / name)
            for suffix in (".bin", ".xml"):  # the graph is found by its .xml, which comes last
                os.replace((Path(scratch) / name).with_suffix(suffix), (kept / name).with_suffix(suffix))
    return network


def _traced(function: graph.Function) -> Any:
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
        dynamic = (
            {0: -1, 2: -1} if name in function.past else {0: -1, 1: -1} if name in function.inputs else {}
        )
        shape = [dynamic.get(axis, width) for axis, width in enumerate(example.shape)]
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


def _fill(network: Any, held: Mapping[str, _StoredTensor]) -> None:
    """Put an artifact's tensors in the places of the parameters that stand for them."""
    from openvino import opset13 as op

    nodes = {node.get_friendly_name(): node for node in network.get_parameters()}
    places = {name: node for name, node in nodes.items() if name in held}
    for names in _beside(places, held):
        # One product is faster than several of the same inputs.
        products = [_readers(places[name])[0].get_node() for name in names]
        whole = _joined([held[name] for name in names])
        value = whole.value(whole.constants(names[0]))
        product = op.matmul(products[0].input_value(0), value, False, True)
        rows = op.constant([held[name].shape[0] for name in names])
        for number, output in enumerate(op.variadic_split(product, op.constant(-1), rows).outputs()):
            for reader in products[number].output(0).get_target_inputs():
                reader.replace_source_output(output)
        for name in names:
            network.remove_parameter(places.pop(name))
    for name, node in places.items():
        constants = held[name].constants(name)
        # What each reader is given is unpacked for it alone: shared, it would be kept unpacked in memory.
        for reader in _readers(node):
            reader.replace_source_output(held[name].value(constants).output(0))
        network.remove_parameter(node)


def _readers(node: Any) -> list[Any]:
    return sorted(
        node.output(0).get_target_inputs(), key=lambda reader: str(reader.get_node().get_type_name())
    )


def _beside(places: Mapping[str, Any], held: Mapping[str, _StoredTensor]) -> list[list[str]]:
    """The linears that read the same and are held alike, so that their rows can be those of one."""
    found: dict[Any, list[str]] = {}
    for name, node in places.items():
        readers = _readers(node)
        product = readers[0].get_node() if len(readers) == 1 else None
        if product is None or product.get_type_name() != "MatMul" or not held[name].even:
            continue
        turned = product.get_attributes()
        if turned["transpose_a"] or not turned["transpose_b"]:
            continue
        source = product.input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index(), held[name].kind)
        found.setdefault(key, []).append(name)
    return [sorted(names) for names in found.values() if len(names) > 1]


_Constant = tuple[np.ndarray[Any, Any], str, tuple[int, ...]]
"""Bytes, OpenVINO's name of their type, and a shape."""


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of this shape as it is written: `weight`, or `packed` integers with `scales` and maybe `zeros`."""

    parts: Mapping[str, _Constant]
    shape: tuple[int, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal where tensors differ in values and rows only."""
        return tuple((part, kind, shape[1:]) for part, (_, kind, shape) in self.parts.items())

    @property
    def even(self) -> bool:
        """Whether its integers fill whole bytes."""
        return all(math.prod(shape) % 2 == 0 for _, _, shape in self.parts.values())

    def constants(self, name: str) -> dict[str, Any]:
        stem = name.removesuffix("weight")
        return {
            part: _constant(name if part == "weight" else stem + part, *piece)
            for part, piece in self.parts.items()
        }

    def value(self, constants: Mapping[str, Any]) -> Any:
        """A new node that gives the values of these constants, in fp32."""
        from openvino import opset13 as op

        if "weight" in constants:
            return op.convert(constants["weight"], "f32")
        value = op.convert(constants["packed"], "f16")
        if "zeros" in constants:
            value = op.subtract(value, op.convert(constants["zeros"], "f16"))
        value = op.multiply(value, constants["scales"])
        if len(self.parts["packed"][2]) > 2:
            value = op.reshape(value, list(self.shape), special_zero=False)
        return op.convert(value, "f32")


def _joined(held: Sequence[_StoredTensor]) -> _StoredTensor:
    """The rows of all, one after the other."""
    parts = {}
    for part, (_, kind, shape) in held[0].parts.items():
        pieces = [one.parts[part] for one in held]
        rows = sum(piece[2][0] for piece in pieces)
        parts[part] = (np.concatenate([piece[0].reshape(-1) for piece in pieces]), kind, (rows, *shape[1:]))
    return _StoredTensor(parts, (sum(one.shape[0] for one in held), *held[0].shape[1:]))


def _held(model: Model) -> dict[str, _StoredTensor]:
    """All tensors of an artifact, by the names that the graph's parameters have for them."""
    found = {}
    for name, tensor in distinct_tensors(model.module).items():
        found[name] = _dense(tensor)
    for name, layer in (*model.linears().items(), *model.tables().items()):
        if isinstance(layer, SparseLinear):
            found[f"{name}.weight"] = _dense(layer.weight())
        elif isinstance(layer, (PackedLinear, PackedEmbedding)):
            shape = (layer.spec.out_features, layer.spec.in_features)
            found[f"{name}.weight"] = _StoredTensor(_pieces(layer), shape)
    return found


def _dense(tensor: Tensor) -> _StoredTensor:
    written = tensor.detach().to(written_dtype(tensor)).contiguous()
    kinds = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32",
             torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip
    raw = written.reshape(-1).view(torch.uint8).numpy()
    return _StoredTensor({"weight": (raw, kinds[written.dtype], tuple(tensor.shape))}, tuple(tensor.shape))


def _constant(name: str, array: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> Any:
    import openvino

    tensor = openvino.Tensor(array.reshape(-1), openvino.Shape(shape), getattr(openvino.Type, kind))
    constant = openvino.op.Constant(tensor, shared_memory=False)
    constant.set_friendly_name(_OWN + name)
    return constant


def _pieces(layer: PackedLinear | PackedEmbedding) -> dict[str, _Constant]:
    """The constants of a packed layer."""
    spec, known = layer.spec, layer.packing
    bits, group = _bits(known), _group(spec)
    grouped = (
        (spec.out_features, spec.in_features // group, group)
        if group
        else (spec.out_features, spec.in_features)
    )
    single = (*grouped[:-1], 1)
    repeats = 1 if not group else (known.group // group)

    def spread(per_group: Tensor) -> Tensor:
        wide = per_group.repeat_interleave(repeats, dim=1)[:, : single[1]] if group else per_group
        return wide.contiguous()

    integers = unpack(layer.packed, known.bits, spec.in_features)
    found: dict[str, _Constant] = {}
    if known.symmetric:
        signed = integers.to(torch.int16) - 2 ** (known.bits - 1)
        found["packed"] = (_packed(signed, bits), f"i{bits}", grouped)
    else:
        found["packed"] = (_packed(integers, bits), f"u{bits}", grouped)
        zeros = spread(layer.zeros)
        if known.real_zeros:
            found["zeros"] = (zeros.half().numpy().view(np.uint8), "f16", single)
        else:
            found["zeros"] = (_packed(zeros, bits), f"u{bits}", single)
    found["scales"] = (spread(layer.scales).half().numpy().view(np.uint8), "f16", single)
    return found


def _packed(values: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Integers of 4 or 8 bits, two's complement where negative, as OpenVINO has them: all rows as one."""
    flat = (values.to(torch.int16) & (2**bits - 1)).view(1, -1)
    found = pack(flat, bits)[0, : math.ceil(flat.numel() * bits / 8)]
    return cast("np.ndarray[Any, Any]", found.numpy())


def _bits(packing: Packing) -> int:
    """OpenVINO multiplies by integers of 4 and 8 bits; fewer take the room of 4."""
    return 4 if packing.bits <= 4 else 8


def _group(spec: LinearSpec) -> int:
    """Weights to a scale, 0 where a whole row has one. OpenVINO's groups divide a row evenly: an uneven rest makes
    all of a row's groups as small as both divide by, with the scale of the larger one they lie in."""
    assert spec.packing is not None
    whole_row = spec.packing.group == 0 or spec.packing.group >= spec.in_features
    return 0 if whole_row else math.gcd(spec.packing.group, spec.in_features)


def _bytes_of(spec: LinearSpec) -> Iterator[int]:
    """The bytes of each constant of a linear or a table."""
    weights = spec.out_features * spec.in_features
    if spec.packing is None:
        yield 2 * weights
    else:
        bits, group = _bits(spec.packing), _group(spec)
        scales = weights // group if group else spec.out_features
        yield math.ceil(weights * bits / 8)
        yield 2 * scales
        if not spec.packing.symmetric:
            yield 2 * scales if spec.packing.real_zeros else math.ceil(scales * bits / 8)
        if spec.packing.input_scales:
            yield 2 * spec.in_features
    if spec.bias:
        yield 2 * spec.out_features


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _stateful(network: Any) -> Any:
    """The same graph with the KV cache as its state, empty at first, its rows reordered by beam_idx at each step."""
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


def _lay_out(loose: Path, out: Path, room: int) -> None:
    """Write the graph with its constants in our order: the model's tensors one by one, then those of the graph,
    each once, filled up to their fixed room."""
    written = np.memmap(loose / WEIGHTS, np.uint8, "r")
    tree = ElementTree.parse(loose / GRAPH)
    ours: list[tuple[bool, str, ElementTree.Element]] = []
    others: list[ElementTree.Element] = []
    for layer in tree.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        name = layer.get("name", "")
        if name.startswith(_OWN):
            ours.append((data.get("element_type") in _NARROW, name, data))
        else:
            others.append(data)
    places: dict[tuple[int, int], int] = {}
    with (out / WEIGHTS).open("wb") as file:
        # What has two bytes a number comes first, so that all of it lies even.
        for _, _, data in sorted(ours, key=lambda one: one[:2]):
            start, size = int(data.get("offset", 0)), int(data.get("size", 0))
            data.set("offset", str(file.tell()))
            file.write(written[start : start + size].data)
        file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
        end = file.tell() + room
        for data in others:
            place = (int(data.get("offset", 0)), int(data.get("size", 0)))
            if place not in places:
                places[place] = file.tell()
                file.write(written[place[0] : sum(place)].tobytes().ljust(_aligned(place[1]), b"\0"))
            data.set("offset", str(places[place]))
        if file.tell() > end:
            raise RuntimeError(
                f"the graph's own constants take {file.tell() - end} bytes more than the {room} foreseen"
            )
        file.write(b"\0" * (end - file.tell()))
    _rename(tree)
    tree.write(out / GRAPH)


def _rename(tree: Any) -> None:
    """Name operations by their places in the graph: the names they have are counted through the process, so that
    the same model would be written differently each time."""
    tree.getroot().set("name", "slimfront")
    for layer in tree.iter("layer"):
        if layer.get("type") != "Parameter" and not layer.get("name", "").startswith(_OWN):
            layer.set("name", f"{layer.get('type')}_{layer.get('id')}")
    for notes in tree.iter("rt_info"):
        for note in [note for note in notes if note.get("name") == "fused_names"]:
            notes.remove(note)
    for port in tree.iter("port"):
        if "names" in port.attrib and port.get("names") not in _NAMED:
            del port.attrib["names"]
