"""The runtime `onnxruntime`: ONNX Runtime on the CPU, with all its graph optimizations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

LIBRARY = "onnxruntime"
FORMAT = "onnx"
READS = ("onnx",)
GRAPH = "model.onnx"

_PAST = "past_key_values."
"""Prefix of the inputs for cached keys and values."""
_PRODUCTS = ("MatMul", "MatMulNBits", "MatMulInteger")


def missing() -> str | None:
    libraries = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if libraries:
        return f"{' and '.join(libraries)} not installed: pip install 'slimfront[onnx]'"
    return None


def start(folder: Path, threads: int) -> OnnxRunner:
    return OnnxRunner(folder, threads)


class OnnxRunner:
    """A graph optimized by ONNX Runtime, and the cached keys and values of its current sequence."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnx

        self._folder = folder
        self._threads = threads
        self._graph = onnx.load(folder / GRAPH, load_external_data=False)
        self._cache_shapes: dict[str, tuple[int, ...]] = {}
        """Shapes [rows, heads, tokens, width] of the cached keys and values, by input; only heads and width are set."""
        for graph_input in self._graph.graph.input:
            if graph_input.name.startswith(_PAST):
                dimensions = graph_input.type.tensor_type.shape.dim
                self._cache_shapes[graph_input.name] = tuple(axis.dim_value for axis in dimensions)
        self._all_tokens: Any = None
        self._last_token: Any = None
        self._past: dict[str, Any] = {}
        self._cached_tokens = 0

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        if self._all_tokens is None:
            self._all_tokens = self._session(last_only=False)
        self._start_sequence(len(rows))
        output = self._run(self._all_tokens, rows)
        self._start_sequence(0)
        return output

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        if not self._cache_shapes:
            return self.answer(tokens)
        if self._last_token is None:
            self._last_token = self._session(last_only=True)
        self._start_sequence(1)
        return self._run(self._last_token, tokens)

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        if not self._cached_tokens:
            raise ValueError("decode needs a causal model and a prefill before it")
        return self._run(self._last_token, token)

    def _start_sequence(self, rows: int) -> None:
        """Empty the cache, for this number of rows."""
        import onnxruntime

        self._cached_tokens = 0
        self._past = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, heads, 0, width), np.float32))
            for name, (_, heads, _, width) in self._cache_shapes.items()
        }

    def _session(self, last_only: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        graph = self._graph
        if last_only:
            graph = _last_token_only(graph)
        return onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _run(self, session: Any, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        """Append these tokens to the sequence, and return the graph's output for them."""
        batch, tokens = rows.shape
        start, end = self._cached_tokens, self._cached_tokens + tokens
        inputs = {"input_ids": rows, "attention_mask": np.ones((batch, end), np.int64)}
        if self._cache_shapes:
            inputs["position_ids"] = np.ascontiguousarray(
                np.broadcast_to(np.arange(start, end), (batch, tokens))
            )
        binding = session.io_binding()
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        for name, past in self._past.items():
            binding.bind_ortvalue_input(name, past)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        output, *present = binding.get_outputs()
        self._past = dict(zip(self._cache_shapes, present, strict=True))
        self._cached_tokens = end
        array: np.ndarray[Any, Any] = output.numpy()
        return array


def _last_token_only(model: Any) -> Any:
    """Return a copy of the graph that computes the logits of the last token only."""
    import onnx
    from onnx import helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = copy.graph.node
    position = _nearest_product(nodes, "logits")
    states = nodes[position].input[0]
    bounds = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    added = [
        helper.make_node("Constant", [], [f"last/{name}"], value_ints=values)
        for name, values in bounds.items()
    ]
    added.append(helper.make_node("Slice", [states, *(f"last/{name}" for name in bounds)], ["last/states"]))
    for node in nodes:
        for index, name in enumerate(node.input):
            if name == states:
                node.input[index] = "last/states"
    for node in reversed(added):
        nodes.insert(position, node)
    return copy


def _nearest_product(nodes: Any, name: str) -> int:
    """Return the index of the product that is nearest to a value among the nodes that it depends on."""
    producers = {output: index for index, node in enumerate(nodes) for output in node.output}
    queue = [producers[name]]
    for index in queue:
        node = nodes[index]
        if node.op_type in _PRODUCTS:
            return index
        queue += [producers[input_name] for input_name in node.input if input_name in producers]
    raise ValueError(f"{name} does not depend on a matrix product")
