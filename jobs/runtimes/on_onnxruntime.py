"""The runtime `onnxruntime`: ONNX Runtime on the CPU, with all of its own optimizations of the graph."""

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

_PAST, _PRESENT = "past_key_values.", "present."
_PRODUCTS = ("MatMul", "MatMulNBits", "MatMulInteger")


def missing() -> str | None:
    lacking = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} not installed: pip install 'slimfront[onnx]'"
    return None


def start(folder: Path, threads: int) -> OnnxRunner:
    return OnnxRunner(folder, threads)


class OnnxRunner:
    """A graph that ONNX Runtime has optimized, and the keys and values of the sequence that it is at."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnx

        self._folder = folder
        self._threads = threads
        self._graph = onnx.load(folder / GRAPH, load_external_data=False)
        # Heads and width of each block's keys and values: the cache has these names, [rows, heads, tokens, width].
        self._cached = {
            one.name: tuple(axis.dim_value for axis in one.type.tensor_type.shape.dim)
            for one in self._graph.graph.input
            if one.name.startswith(_PAST)
        }
        self._whole: Any = None
        self._last: Any = None
        self._past: dict[str, Any] = {}
        self._tokens = 0

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        if self._whole is None:
            self._whole = self._session(last_only=False)
        self._forget(len(rows))
        said = self._run(self._whole, rows)
        self._forget(0)
        return said

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        if not self._cached:
            return self.answer(tokens)
        if self._last is None:
            self._last = self._session(last_only=True)
        self._forget(1)
        return self._run(self._last, tokens)

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        if not self._tokens:
            raise ValueError("decode needs a causal model and a prefill before it")
        return self._run(self._last, token)

    def _forget(self, rows: int) -> None:
        """Start anew: no tokens of so many rows."""
        import onnxruntime

        self._tokens = 0
        self._past = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, heads, 0, width), np.float32))
            for name, (_, heads, _, width) in self._cached.items()
        }

    def _session(self, last_only: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        graph = _of_last_token(self._graph) if last_only else self._graph
        return onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _run(self, session: Any, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        """What the graph says of these tokens after those of the past, which they join."""
        batch, tokens = rows.shape
        start, end = self._tokens, self._tokens + tokens
        given = {"input_ids": rows, "attention_mask": np.ones((batch, end), np.int64)}
        if self._cached:
            given["position_ids"] = np.ascontiguousarray(
                np.broadcast_to(np.arange(start, end), (batch, tokens))
            )
        binding = session.io_binding()
        for name, values in given.items():
            binding.bind_cpu_input(name, values)
        for name, past in self._past.items():
            binding.bind_ortvalue_input(name, past)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        said, *present = binding.get_outputs()
        self._past = dict(zip(self._cached, present, strict=True))
        self._tokens = end
        answer: np.ndarray[Any, Any] = said.numpy()
        return answer


def _of_last_token(model: Any) -> Any:
    """A copy of the graph that computes the logits of the last token alone."""
    import onnx
    from onnx import helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = copy.graph.node
    at = _product_of(nodes, "logits")
    states = nodes[at].input[0]
    ends = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    added = [
        helper.make_node("Constant", [], [f"last/{name}"], value_ints=values) for name, values in ends.items()
    ]
    added.append(helper.make_node("Slice", [states, *(f"last/{name}" for name in ends)], ["last/states"]))
    for reader in nodes:
        if states in reader.input:
            given = ["last/states" if name == states else name for name in reader.input]
            del reader.input[:]
            reader.input.extend(given)
    for one in reversed(added):
        nodes.insert(at, one)
    return copy


def _product_of(nodes: Any, name: str) -> int:
    """The place of the nearest product among what these values are made of."""
    makers = {output: at for at, node in enumerate(nodes) for output in node.output}
    reached = [makers[name]]
    for at in reached:
        if nodes[at].op_type in _PRODUCTS:
            return at
        reached += [makers[one] for one in nodes[at].input if one in makers]
    raise ValueError(f"{name} comes of no product")
