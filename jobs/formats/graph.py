"""Graph: a model as one function of its inputs and its weights, for formats that hold a graph of operations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.models import loading, stand_in
from jobs.models.layers import round_activations
from jobs.models.layout import Layout, LinearSpec, TensorSpec
from jobs.models.model import Model, distinct_tensors

_VERSION = 1
"""Of how graphs are made: raised when a cached one would differ."""
_ROWS, _NEW, _PAST = 2, 3, 5
"""Sizes to trace with, all different and none of them 1, so that no dimension is taken for another's or fixed."""


@dataclass(frozen=True)
class Function:
    """A model of some artifact's shape without its weights, which are arguments like the inputs.

    module: takes the tensors of `inputs`, `past` and `weights`, in this order, and returns those of `outputs`, then
        one of `present` for each of `past`. All floats are fp32.
    inputs: input_ids and attention_mask; a causal model's position_ids too. The mask covers past and new tokens.
    past: the keys and values of each block, [rows, heads, past tokens, head width].
    weights: by full name as in the dense artifact: packed and sparse ones stand as `NAME.weight`; example values.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    past: dict[str, Float[Tensor, "rows heads past width"]]
    weights: dict[str, Tensor]
    outputs: tuple[str, ...]

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(name.replace("past", "present", 1) for name in self.past)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Examples of all arguments, in their order."""
        return (*self.inputs.values(), *self.past.values(), *self.weights.values())


def function_of(artifact: Path) -> Function:
    """The function of an artifact's model. Only its layout and config are read, no weights."""
    layout = Layout.read(artifact)
    model = _skeleton(artifact, layout)
    module = model.module.float()
    weights = {name: _anything(tensor) for name, tensor in distinct_tensors(module).items()}
    causal = layout.task == "causal-lm"
    past_tokens = _PAST if causal else 0
    inputs = {
        "input_ids": torch.ones(_ROWS, _NEW, dtype=torch.int64),
        "attention_mask": torch.ones(_ROWS, past_tokens + _NEW, dtype=torch.int64),
    }
    past = {}
    if causal:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).repeat(_ROWS, 1)
        for block, shape in enumerate(_cached_shapes(module, weights)):
            for part in ("key", "value"):
                past[f"past_key_values.{block}.{part}"] = torch.zeros(_ROWS, shape[1], _PAST, shape[3])
    function = _Function(module, tuple(weights), len(inputs), len(past), layout.task)
    outputs = ("last_hidden_state",) if layout.task == "embedding" else ("logits",)
    return Function(function, inputs, past, weights, outputs)


def trace(function: Function) -> torch.jit.ScriptModule:
    """The function as TorchScript, whose constants are those of the graph alone."""
    with torch.no_grad():
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            function.module, function.arguments, check_trace=False, strict=False
        )
    return traced


def other_tensors(layout: Layout) -> dict[str, TensorSpec]:
    """The tensors beside linears and tables that have a part in what a model of this task answers, and so in its
    function: a sentence's vector is made without the pooler."""
    pooled = layout.task != "embedding"
    return {name: spec for name, spec in layout.others.items() if pooled or not name.startswith("pooler.")}


def structure_key(artifact: Path) -> str:
    """The digest of all that decides the function of an artifact: equal for models that differ in weights and bits."""
    layout = Layout.read(artifact)
    config = json.loads((artifact / "config.json").read_text())
    around = {
        name: (spec.packing.input_scales, spec.packing.activation_bits)
        for name, spec in layout.linears.items()
        if spec.packing is not None
    }
    parts = [_VERSION, loading.VERSIONS, config, _dense(layout).to_dict(), around]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class _Function(nn.Module):
    """See `Function`."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], inputs: int, past: int, task: str) -> None:
        super().__init__()
        # No child of this: what is traced would hold its tensors.
        self._held = [module]
        self._places = _taken(module, names)
        self._splits = (inputs, inputs + past)
        self._task = task
        self._caches = hasattr(module.config, "use_cache")
        self._cache_name = loading.cache_name(module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, past, values = (
            tensors[: self._splits[0]], tensors[self._splits[0] : self._splits[1]], tensors[self._splits[1] :]
        )  # fmt: skip
        given: dict[str, Any] = {"input_ids": inputs[0], "attention_mask": inputs[1]}
        if self._task == "classification" and self._caches:
            given["use_cache"] = False
        if self._task == "causal-lm":
            given |= {"position_ids": inputs[2], "use_cache": True}
            given[self._cache_name] = loading.cache_with(list(zip(past[::2], past[1::2], strict=True)))
        # Not by functional_call, which refuses to be traced.
        for places, value in zip(self._places, values, strict=True):
            for part, child in places:
                setattr(part, child, value)
        said = self._held[0](**given)
        if self._task == "embedding":
            return (said.last_hidden_state,)
        present = loading.cached_tensors(said[self._cache_name]) if self._task == "causal-lm" else []
        return (said.logits, *present)


def _taken(module: nn.Module, names: Sequence[str]) -> list[list[tuple[nn.Module, str]]]:
    """Take these tensors from a module, so that any may be put there: of each all places that it stood at."""
    state = module.state_dict(keep_vars=True)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, tensor in state.items():
        path, _, child = name.rpartition(".")
        places.setdefault(id(tensor), []).append((module.get_submodule(path), child))
    found = [places[id(state[name])] for name in names]
    for part, child in (place for one in found for place in one):
        part._parameters.pop(child, None)
        part._buffers.pop(child, None)
    return found


class ScaledLinear(nn.Module):
    """What stands for a packed linear that scales or rounds its inputs: its weight is that without input scales."""

    weight: nn.Parameter
    input_scales: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        assert spec.packing is not None
        self.bits = spec.packing.activation_bits
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features), requires_grad=False)
        shapes = {
            "input_scales": (spec.in_features, spec.packing.input_scales),
            "bias": (spec.out_features, spec.bias),
        }
        for name, (width, there) in shapes.items():
            value = nn.Parameter(torch.empty(width), requires_grad=False) if there else None
            self.register_parameter(name, value)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        read = x if self.input_scales is None else x * self.input_scales
        if self.bits != 16:
            whole, steps = round_activations(read, self.bits)
            read = whole * steps
        return nn.functional.linear(read, self.weight, self.bias)


def _skeleton(artifact: Path, layout: Layout) -> Model:
    """The artifact's model with plain linears in the places of packed and sparse ones, and no weights."""
    model = stand_in.uninitialized_model(artifact, _dense(layout))
    for name, spec in layout.linears.items():
        known = spec.packing
        if known is not None and (known.input_scales or known.activation_bits != 16):
            model.replace(name, ScaledLinear(spec))
    return model


def _dense(layout: Layout) -> Layout:
    def plain(specs: dict[str, LinearSpec]) -> dict[str, LinearSpec]:
        return {name: dataclasses.replace(spec, packing=None, kept=None) for name, spec in specs.items()}

    return dataclasses.replace(layout, linears=plain(dict(layout.linears)), tables=plain(dict(layout.tables)))


def _anything(tensor: Tensor) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype).expand(tensor.shape)


@torch.no_grad()
def _cached_shapes(module: nn.Module, weights: dict[str, Tensor]) -> Sequence[torch.Size]:
    """The shape of each block's keys, which have as many heads as the values, from a run with any weights."""
    given = {"input_ids": torch.ones(_ROWS, _NEW, dtype=torch.int64), "use_cache": True}
    said = cast(Any, torch.func.functional_call(module, weights, kwargs=given))
    return [keys.shape for keys in loading.cached_tensors(said[loading.cache_name(module)])[::2]]
