"""A model as one function of its inputs and weights, from which formats that store a graph of operations trace it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
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
"""Version of this code in the keys of cached graphs: increase it when graphs change."""
_ROWS, _NEW, _PAST = 2, 3, 5
"""Sizes of the example inputs: all different and none 1, so that tracing confuses no dimensions and fixes none."""


@dataclass(frozen=True)
class Function:
    """A model of an artifact's shapes whose weights are arguments like its inputs. All floats are fp32."""

    module: nn.Module
    """Takes the tensors of `inputs`, `past` and `weights`, in this order; returns `outputs`, then `present`."""
    inputs: dict[str, Tensor]
    """Examples of input_ids and attention_mask (of past and new tokens), for causal models also of position_ids."""
    past: dict[str, Float[Tensor, "rows heads past width"]]
    """Examples of the cached keys and values of each block; empty unless the model is causal."""
    weights: dict[str, Tensor]
    """Examples of the weights, by full name; packed and sparse ones are dense `NAME.weight` here."""
    outputs: tuple[str, ...]

    @property
    def present(self) -> tuple[str, ...]:
        """Return the names of the keys and values after the new tokens, one for each of `past`."""
        return tuple(name.replace("past", "present", 1) for name in self.past)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Return examples of all arguments, in order."""
        return (*self.inputs.values(), *self.past.values(), *self.weights.values())


def function_of(artifact: Path) -> Function:
    """Return the function of an artifact's model. Reads its layout and config, no weights."""
    layout = Layout.read(artifact)
    model = _skeleton(artifact, layout)
    module = model.module.float()
    weights = {name: _placeholder(tensor) for name, tensor in distinct_tensors(module).items()}
    causal = layout.task == "causal-lm"
    past_tokens = _PAST if causal else 0
    inputs = {
        "input_ids": torch.ones(_ROWS, _NEW, dtype=torch.int64),
        "attention_mask": torch.ones(_ROWS, past_tokens + _NEW, dtype=torch.int64),
    }
    past = {}
    if causal:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).repeat(_ROWS, 1)
        for block, shape in enumerate(_key_shapes(module, weights)):
            for part in ("key", "value"):
                past[f"past_key_values.{block}.{part}"] = torch.zeros(_ROWS, shape[1], _PAST, shape[3])
    function = _Function(module, tuple(weights), len(inputs), len(past), layout.task)
    outputs = ("last_hidden_state",) if layout.task == "embedding" else ("logits",)
    return Function(function, inputs, past, weights, outputs)


def trace(function: Function) -> torch.jit.ScriptModule:
    """Return the function as TorchScript, which contains no weights."""
    with torch.no_grad():
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            function.module, function.arguments, check_trace=False, strict=False
        )
    return traced


def other_tensors(layout: Layout) -> dict[str, TensorSpec]:
    """Return the tensors, besides linears and tables, that the function uses: embeddings need no pooler."""
    pooled = layout.task != "embedding"
    return {name: spec for name, spec in layout.others.items() if pooled or not name.startswith("pooler.")}


def structure_key(artifact: Path) -> str:
    """Return a key that is equal for artifacts with equal functions: they differ only in weights and in packing."""
    layout = Layout.read(artifact)
    config = json.loads((artifact / "config.json").read_text())
    input_transforms = {
        name: (spec.packing.input_scales, spec.packing.activation_bits)
        for name, spec in layout.linears.items()
        if spec.packing is not None
    }
    parts = [_VERSION, loading.VERSIONS, config, _dense(layout).to_dict(), input_transforms]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class _Function(nn.Module):
    """The module of a `Function`."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], inputs: int, past: int, task: str) -> None:
        """names: of the weights, in order. inputs, past: the numbers of these arguments."""
        super().__init__()
        # In a list, so that it is not a submodule: the trace would contain its tensors.
        self._module = [module]
        self._owners = _detach_tensors(module, names)
        self._splits = (inputs, inputs + past)
        self._task = task
        self._caches = hasattr(module.config, "use_cache")
        self._cache_name = loading.cache_name(module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        past_start, weights_start = self._splits
        inputs = tensors[:past_start]
        past = tensors[past_start:weights_start]
        weights = tensors[weights_start:]
        arguments: dict[str, Any] = {"input_ids": inputs[0], "attention_mask": inputs[1]}
        if self._task == "classification" and self._caches:
            arguments["use_cache"] = False
        if self._task == "causal-lm":
            arguments |= {"position_ids": inputs[2], "use_cache": True}
            arguments[self._cache_name] = loading.cache_with(list(zip(past[::2], past[1::2], strict=True)))
        # torch.func.functional_call cannot be traced.
        for owners, weight in zip(self._owners, weights, strict=True):
            for part, child in owners:
                setattr(part, child, weight)
        output = self._module[0](**arguments)
        if self._task == "embedding":
            return (output.last_hidden_state,)
        if self._task != "causal-lm":
            return (output.logits,)
        return (output.logits, *loading.cached_tensors(output[self._cache_name]))


def _detach_tensors(module: nn.Module, names: Sequence[str]) -> list[list[tuple[nn.Module, str]]]:
    """Remove these tensors from a module, so that any tensor can be set as an attribute in their place.

    Returns for each name the submodules and attributes that referred to its tensor.
    """
    state = module.state_dict(keep_vars=True)
    owners_by_id: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, tensor in state.items():
        path, _, child = name.rpartition(".")
        owners_by_id.setdefault(id(tensor), []).append((module.get_submodule(path), child))
    owners = [owners_by_id[id(state[name])] for name in names]
    for part, child in itertools.chain.from_iterable(owners):
        part._parameters.pop(child, None)
        part._buffers.pop(child, None)
    return owners


class ScaledLinear(nn.Module):
    """The dense counterpart of a packed linear that scales or rounds its inputs; `weight` excludes input scales."""

    weight: nn.Parameter
    input_scales: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        assert spec.packing is not None
        self.bits = spec.packing.activation_bits
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features), requires_grad=False)
        self.register_parameter("input_scales", None)
        if spec.packing.input_scales:
            self.input_scales = nn.Parameter(torch.empty(spec.in_features), requires_grad=False)
        self.register_parameter("bias", None)
        if spec.bias:
            self.bias = nn.Parameter(torch.empty(spec.out_features), requires_grad=False)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.input_scales is not None:
            x = x * self.input_scales
        if self.bits != 16:
            rounded, steps = round_activations(x, self.bits)
            x = rounded * steps
        return nn.functional.linear(x, self.weight, self.bias)


def _skeleton(artifact: Path, layout: Layout) -> Model:
    """Return an artifact's model without weights, with dense linears instead of packed and sparse ones."""
    model = stand_in.uninitialized_model(artifact, _dense(layout))
    for name, spec in layout.linears.items():
        packing = spec.packing
        if packing is not None and (packing.input_scales or packing.activation_bits != 16):
            model.replace(name, ScaledLinear(spec))
    return model


def _dense(layout: Layout) -> Layout:
    """Return the same layout without packed and sparse linears and tables."""

    def dense(specs: Mapping[str, LinearSpec]) -> dict[str, LinearSpec]:
        return {name: dataclasses.replace(spec, packing=None, kept=None) for name, spec in specs.items()}

    return dataclasses.replace(layout, linears=dense(layout.linears), tables=dense(layout.tables))


def _placeholder(tensor: Tensor) -> Tensor:
    """Return a tensor of this shape and type that takes no memory."""
    return torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype).expand(tensor.shape)


@torch.no_grad()
def _key_shapes(module: nn.Module, weights: dict[str, Tensor]) -> Sequence[torch.Size]:
    """Return the shape of each block's keys, equal to that of its values, from a run with arbitrary weights."""
    arguments = {"input_ids": torch.ones(_ROWS, _NEW, dtype=torch.int64), "use_cache": True}
    output = cast(Any, torch.func.functional_call(module, weights, kwargs=arguments))
    return [keys.shape for keys in loading.cached_tensors(output[loading.cache_name(module)])[::2]]
