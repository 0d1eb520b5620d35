"""The format `onnx`: an ONNX graph with an artifact's own integers and scales beside it, for ONNX Runtime.

Inputs and outputs are those that Optimum and ONNX Runtime's generation expect: input_ids and attention_mask; a causal
model's position_ids and past_key_values.N.key/value too, and present.N.key/value beside its logits.

Dense weights are bf16, which the graph turns into fp32 when it is loaded. Packed ones are multiplied as they are
(`jobs.formats.onnx_blocks`), by ONNX Runtime's own operators, which other programs do not know.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.formats import graph, onnx_blocks, onnx_shapes
from jobs.formats.onnx_weights import INLINE_BYTES, OnnxWeightWriter, aligned
from jobs.models import loading, tokenizers
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear
from jobs.models.layout import Layout, LinearSpec
from jobs.models.model import distinct_tensors
from jobs.runtimes.on_onnxruntime import GRAPH, missing

__all__ = ["missing"]

WEIGHTS = "model.onnx.data"
_OPSET = 18
_VERSION = 1
"""Of how graphs are made: raised when a cached one would differ."""


def refusal(layout: Layout) -> str | None:
    for name, spec in layout.matrices.items():
        known = spec.packing
        if known is None:
            continue
        if known.activation_bits != 16 and known.activation_bits > 8:
            return f"{name} rounds its activations to {known.activation_bits} bits, and ONNX multiplies integers of 8"
        if onnx_blocks.smallest_blocks(spec) is None:
            return f"groups of {known.group} in {name}, and ONNX Runtime's are multiples of 16"
        if name in layout.tables and known.real_zeros:
            return f"zero points of the table {name} that are not whole"
    return None


def size_bytes(layout: Layout, original: Path) -> int:
    sizes = [size for spec in layout.matrices.values() for size in _bytes_of(spec)]
    sizes += [tensor.size_bytes for tensor in graph.other_tensors(layout).values()]
    return sum(map(aligned, sizes)) + _room(loading.computed_constant_bytes(original))


def _room(computed: Sequence[int]) -> int:
    """Room for the large constants of a graph: those that the family's code computes."""
    return sum(aligned(size) for size in computed if size > INLINE_BYTES)


def _bytes_of(spec: LinearSpec) -> Iterator[int]:
    """The bytes of each tensor of a linear or a table."""
    if spec.packing is None:
        yield 2 * spec.out_features * spec.in_features
    else:
        yield from onnx_blocks.block_tensor_bytes(spec)
        if spec.packing.input_scales:
            yield 2 * spec.in_features
    if spec.bias:
        yield 2 * spec.out_features


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    network = _skeleton(artifact, cache)
    filled = OnnxWeightWriter(network)
    model = loading.load(artifact)
    packed = {
        f"{name}.weight": layer
        for name, layer in (*model.linears().items(), *model.tables().items())
        if isinstance(layer, (PackedLinear, PackedEmbedding, SparseLinear))
    }
    held = distinct_tensors(model.module)
    for name in sorted(filled.parameters & (packed.keys() | held.keys())):
        layer = packed.get(name)
        if isinstance(layer, (PackedLinear, PackedEmbedding)):
            filled.put_packed(name, layer)
        else:
            filled.put_dense(name, layer.weight() if layer is not None else held[name])
    filled.finish(out / WEIGHTS, _room(loading.computed_constant_bytes_of(model.module)))
    (out / GRAPH).write_bytes(network.SerializeToString(deterministic=True))
    tokenizers.copy_tokenizer(artifact, out)
    shutil.copyfile(artifact / "config.json", out / "config.json")


def _skeleton(artifact: Path, cache: Path | None) -> Any:
    """The graph of an artifact's shape, with parameters in the places of weights; kept for others of this shape."""
    import onnx

    if cache is None:
        return _traced(graph.function_of(artifact))
    kept = cache / "graphs"
    file = kept / f"onnx-{_VERSION}-{onnx.__version__}-{graph.structure_key(artifact)}.onnx"
    if not file.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            made = _traced(graph.function_of(artifact)).SerializeToString(deterministic=True)
            (Path(scratch) / file.name).write_bytes(made)
            os.replace(Path(scratch) / file.name, file)
    return onnx.load_model_from_string(file.read_bytes())


def _traced(function: graph.Function) -> Any:
    """The function as an ONNX model. By way of TorchScript, which traces every family, and in seconds."""
    import onnx

    every = "all_tokens" if function.past else "tokens"
    outputs = {name: name.replace("past_key_values", "present") for name in function.past}
    dynamic = {name: {0: "batch", 1: "tokens"} for name in function.inputs}
    dynamic["attention_mask"] = {0: "batch", 1: every}
    for past, present in outputs.items():
        dynamic |= {past: {0: "batch", 2: "past_tokens"}, present: {0: "batch", 2: every}}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that become constants, and of the exporter's age
        torch.onnx.export(
            function.module, function.arguments, Path(scratch) / GRAPH, dynamo=False, opset_version=_OPSET,
            input_names=[*function.inputs, *function.past, *function.weights],
            output_names=[*function.outputs, *outputs.values()],
            dynamic_axes=dynamic,
        )  # fmt: skip
        traced = onnx.load(Path(scratch) / GRAPH)
    sizes = {"batch": ("input_ids", 0), "tokens": ("input_ids", 1)}
    if function.past:
        sizes |= {every: ("attention_mask", 1), "past_tokens": (next(iter(function.past)), 2)}
    return onnx_shapes.share_sizes(traced, sizes)
