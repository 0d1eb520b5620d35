"""The runtime `openvino`: OpenVINO on the CPU, with its defaults for latency."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

LIBRARY = "openvino"
FORMAT = "openvino"
READS = ("openvino",)
GRAPH = "openvino_model.xml"


def missing() -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install 'slimfront[openvino]'"
    return None


def start(folder: Path, threads: int) -> OpenVinoRunner:
    return OpenVinoRunner(folder, threads)


class OpenVinoRunner:
    """A compiled graph, and the state of its current sequence."""

    def __init__(self, folder: Path, threads: int, **options: object) -> None:
        """options: of OpenVINO's CPU plugin, in addition to those set here."""
        import openvino

        self._core = openvino.Core()
        self._options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        network = self._core.read_model(folder / GRAPH)
        self._decodes = any(port.any_name == "beam_idx" for port in network.inputs)
        self._all_tokens: Any = None
        self._network = network
        self._request: Any = None
        self._cached_tokens = 0

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        if self._all_tokens is None:
            self._all_tokens = self._compiled(last_only=False)
        return self._run(self._all_tokens, rows, 0)

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        if self._request is None:
            self._request = self._compiled(last_only=self._decodes)
        self._cached_tokens = tokens.shape[1]
        return self._run(self._request, tokens, 0)

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        if not self._cached_tokens or not self._decodes:
            raise ValueError("decode needs a causal model and a prefill before it")
        self._cached_tokens += 1
        return self._run(self._request, token, self._cached_tokens - 1)

    def _compiled(self, last_only: bool) -> Any:
        network = self._network
        if last_only:
            network = _last_token_only(network)
        return self._core.compile_model(network, "CPU", self._options).create_infer_request()

    def _run(
        self, request: Any, rows: Int[np.ndarray, "batch tokens"], past: int
    ) -> Float[np.ndarray, "batch ..."]:
        batch, tokens = rows.shape
        inputs = {"input_ids": rows, "attention_mask": np.ones((batch, past + tokens), np.int64)}
        if self._decodes:
            if past == 0:
                request.reset_state()
            inputs["position_ids"] = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
            inputs["beam_idx"] = np.arange(batch, dtype=np.int32)
        request.infer(inputs, share_inputs=True)
        output: np.ndarray[Any, Any] = request.get_output_tensor(0).data.copy()
        return output


def _last_token_only(network: Any) -> Any:
    """Return a copy of the graph that computes the logits of the last token only, as OpenVINO GenAI does."""
    from openvino import opset13 as op

    copy = network.clone()
    product = next(iter(copy.get_results())).input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    states = product.input_value(0)
    last = op.slice(
        states, op.constant([-1]), op.constant([np.iinfo(np.int64).max]), op.constant([1]), op.constant([1])
    )
    product.input(0).replace_source_output(last.output(0))
    copy.validate_nodes_and_infer_types()
    return copy
