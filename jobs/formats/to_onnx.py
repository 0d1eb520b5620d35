"""The format `onnx`: an ONNX graph, and a file with an artifact's integers and scales, for ONNX Runtime.

Inputs and outputs are those that Optimum and ONNX Runtime's generation expect: input_ids and attention_mask; for
causal models also position_ids and past_key_values.N.key/value as inputs, and present.N.key/value as outputs.

Dense weights are bf16; the graph casts them to fp32 when it is loaded. Packed ones are multiplied without unpacking
(`jobs.formats.onnx_blocks`), by operators that only ONNX Runtime has.
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
"""Version of this code in the names of cached graphs: increase it when graphs change."""


def refusal(layout: Layout) -> str | None:
    for name, spec in layout.matrices.items():
        packing = spec.packing
        if packing is None:
            continue
        if packing.activation_bits != 16 and packing.activation_bits > 8:
            return f"{name} rounds its activations to {packing.activation_bits} bits, and ONNX multiplies integers of 8"
        if onnx_blocks.smallest_blocks(spec) is None:
            return f"groups of {packing.group} in {name}, and ONNX Runtime's are multiples of 16"
        if name in layout.tables and packing.real_zeros:
            return f"zero points of the table {name} that are not integers"
    return None


def size_bytes(layout: Layout, original: Path) -> int:
    sizes = [size for spec in layout.matrices.values() for size in _tensor_bytes(spec)]
    sizes += [tensor.size_bytes for tensor in graph.other_tensors(layout).values()]
    return sum(map(aligned, sizes)) + _constants_bytes(loading.computed_constant_bytes(original))


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    network = _skeleton(artifact, cache)
    writer = OnnxWeightWriter(network)
    model = loading.load(artifact)
    tensors = distinct_tensors(model.module)
    layers = {f"{name}.weight": layer for name, layer in (*model.linears().items(), *model.tables().items())}
    for name in sorted(writer.parameters & (layers.keys() | tensors.keys())):
        layer = layers.get(name)
        if isinstance(layer, (PackedLinear, PackedEmbedding)):
            writer.put_packed(name, layer)
        elif isinstance(layer, SparseLinear):
            writer.put_dense(name, layer.weight())
        else:
            writer.put_dense(name, tensors[name])
    writer.finish(out / WEIGHTS, _constants_bytes(loading.computed_constant_bytes_of(model.module)))
    (out / GRAPH).write_bytes(network.SerializeToString(deterministic=True))
    tokenizers.copy_tokenizer(artifact, out)
    shutil.copyfile(artifact / "config.json", out / "config.json")


def _constants_bytes(computed: Sequence[int]) -> int:
    """Return the bytes that the file reserves for the constants that the model computes, given their sizes."""
    return sum(aligned(size) for size in computed if size > INLINE_BYTES)


def _tensor_bytes(spec: LinearSpec) -> Iterator[int]:
    """Yield the bytes of each tensor of a linear or a table."""
    if spec.packing is None:
        yield 2 * spec.out_features * spec.in_features
    else:
        yield from onnx_blocks.block_tensor_bytes(spec)
        if spec.packing.input_scales:
            yield 2 * spec.in_features
    if spec.bias:
        yield 2 * spec.out_features


def _skeleton(artifact: Path, cache: Path | None) -> Any:
    """Return the graph of an artifact's shapes, with parameters instead of weights; equal shapes share a cached one."""
    import onnx

    if cache is None:
        return _traced(graph.function_of(artifact))
    folder = cache / "graphs"
    file = folder / f"onnx-{_VERSION}-{onnx.__version__}-{graph.structure_key(artifact)}.onnx"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            traced = _traced(graph.function_of(artifact))
            (Path(scratch) / file.name).write_bytes(traced.SerializeToString(deterministic=True))
            os.replace(Path(scratch) / file.name, file)
    return onnx.load_model_from_string(file.read_bytes())


def _traced(function: graph.Function) -> Any:
    """Return the function as an ONNX model, by TorchScript, which traces every family in seconds."""
    import onnx

    mask_tokens = "tokens"
    if function.past:
        mask_tokens = "all_tokens"
    outputs = {name: name.replace("past_key_values", "present") for name in function.past}
    dynamic = {name: {0: "batch", 1: "tokens"} for name in function.inputs}
    dynamic["attention_mask"] = {0: "batch", 1: mask_tokens}
    for past, present in outputs.items():
        dynamic |= {past: {0: "batch", 2: "past_tokens"}, present: {0: "batch", 2: mask_tokens}}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        # The exporter warns about values that become constants, and that it is deprecated.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            function.module, function.arguments, Path(scratch) / GRAPH, dynamo=False, opset_version=_OPSET,
            input_names=[*function.inputs, *function.past, *function.weights],
            output_names=[*function.outputs, *outputs.values()],
            dynamic_axes=dynamic,
        )  # fmt: skip
        traced = onnx.load(Path(scratch) / GRAPH)
    sizes = {"batch": ("input_ids", 0), "tokens": ("input_ids", 1)}
    if function.past:
        sizes |= {mask_tokens: ("attention_mask", 1), "past_tokens": (next(iter(function.past)), 2)}
    return onnx_shapes.share_sizes(traced, sizes)
