"""Check that the weight files of an original contain exactly the parameters of its architecture.

transformers initializes a missing parameter at random, and ignores a tensor that it does not know. Both would change a
model without a message, so both are refused here. Only the headers of the files are read, except in `check_values`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jobs.models import loading
from jobs.models.facts import remembered
from jobs.models.families import family
from jobs.models.layout import LAYOUT_FILE

INDEX = "model.safetensors.index.json"
"""The file that names the shard of each tensor."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights, as safetensors spells them."""
_DECODER_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification")
_ENCODER_ENDINGS = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")
"""Endings of the names of supported architectures. Other heads would be dropped, or filled at random."""
_BUFFER = re.compile(r"(position_ids|token_type_ids|masked_bias|inv_freq|(attn|attention)\.bias)$")
"""Buffers that older versions of transformers wrote into files: positions, causal masks and rotary frequencies. A model
computes them from its config."""
_POINTER = b"version https://git-lfs"
_MAX_NAMES = 3
"""Names in a message, at most."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: str
    dtype: str
    """As safetensors spells it: F32, BF16, I8 …"""
    shape: tuple[int, ...]


def check_weights(folder: Path) -> None:
    """Raise ValueError or FileNotFoundError unless the weights of an original match its config.

    Refused are damaged, missing and foreign files, adapters, quantized weights, and every difference between the
    tensors of the files and the parameters of the architecture. The message names the file or the tensors.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_kind(folder, config)
    _check_architecture(folder, config)
    tensors = headers(folder)
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    contents = [json.dumps(config, sort_keys=True), json.dumps(header)]
    differences = remembered("weights", contents, lambda: loading.differences(folder))
    _refuse(folder, "lacks tensors of the architecture that config.json describes", differences["missing"])
    _refuse_shapes(folder, config, differences["mismatched"])
    foreign = _without_head(folder, tensors, differences["unexpected"])
    _refuse(folder, "contains tensors that the architecture of config.json does not have", foreign)
    weights = tensors.keys() - set(differences["unexpected"])
    integers = [name for name in weights if tensors[name].dtype not in _FLOATS and not _BUFFER.search(name)]
    dtypes = ", ".join(sorted({tensors[name].dtype.replace("I", "int") for name in integers}))
    _refuse(folder, f"contains weights of type {dtypes}; expected floating-point weights", integers)
    _check_tied(folder, tensors)


def check_values(folder: Path, digest: str) -> None:
    """Raise ValueError if a weight of an original is NaN or infinite.

    Reads all weights, one tensor at a time; the answer is remembered by the `loading.digest` of the folder.
    """
    remembered("finite", [digest], lambda: _check_finite(folder))


def _check_finite(folder: Path) -> None:
    for file in weight_files(folder):
        with _opened(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - an open file is no dict
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{folder / file}: {name} contains NaN or infinite values")


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers loads: the single file, or the shards of the index.

    Raises FileNotFoundError if a file is missing, ValueError if the index names a file outside of the folder.
    """
    if (folder / loading.WEIGHTS).is_file():
        return [loading.WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has neither {loading.WEIGHTS} nor {INDEX}")
    names = sorted(set(_index(folder).values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {INDEX} names: complete the download")
    return names


def headers(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of an original by name. Raises ValueError for a damaged file or a wrong index."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        with _opened(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - an open file is no dict
                if name in tensors:
                    raise ValueError(f"{folder}: both {tensors[name].file} and {file} contain {name}")
                part = opened.get_slice(name)
                tensors[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
    if (folder / loading.WEIGHTS).is_file():
        return tensors
    indexed = _index(folder)
    for name in sorted(indexed.keys() | tensors.keys()):
        if name not in tensors or tensors[name].file != indexed.get(name):
            raise ValueError(
                f"{folder / INDEX} is wrong about {name}: the tensor is not in the file that it names"
            )
    return tensors


def _index(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of shards: {error}") from error


def _opened(file: Path) -> Any:
    """Return an open safetensors file. Opening checks that the tensors cover the file without overlaps."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
            )
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no valid safetensors file: {error}") from error


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for folders that contain something else than an original with floating-point weights."""
    if (folder / LAYOUT_FILE).is_file():
        raise ValueError(
            f"{folder} is a model that slimfront made, it has a {LAYOUT_FILE}: give the original model, and the "
            f"steps as stages of the space"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} contains an adapter (adapter_config.json): merge it into its base model first"
        )
    _check_head(folder / "config.json", config)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{folder / 'config.json'} has a quantization_config ({method}): the weights are quantized already; "
            f"give the model before its quantization"
        )


def _check_head(config_file: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a model whose outputs are not those of a supported task."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else ""
    endings = _ENCODER_ENDINGS if family(str(config["model_type"])).encoder else _DECODER_ENDINGS
    if architecture and not architecture.endswith(endings):
        raise ValueError(
            f"{config_file}: architecture {architecture} is not supported; supported are names that end with "
            f"{', '.join(endings)}"
        )
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            f"{config_file}: use_bidirectional_attention makes an encoder, which is not supported"
        )
    if not architecture.endswith("ForSequenceClassification"):
        return
    problem_type = config.get("problem_type") or "single_label_classification"
    labels = config.get("id2label")
    has_one_output = config.get("num_labels") == 1 or (isinstance(labels, dict) and len(labels) == 1)
    if problem_type != "single_label_classification" or has_one_output:
        kind = "one output (regression)" if has_one_output else f"problem_type {problem_type}"
        raise ValueError(f"{config_file}: {kind} is not supported; expected classes of which one is right")


def _check_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if transformers cannot build the model of config.json, or builds one without blocks."""
    config_file = folder / "config.json"
    try:
        layout = loading.original_layout(folder)
    except Exception as error:  # configs break constructors in many ways: a type, a division, a shape
        reason = " ".join(str(error).split())
        negative = [f"{key}={value}" for key, value in config.items() if type(value) is int and value < 0]
        if negative:
            reason += f" ({', '.join(negative)})"
        raise ValueError(
            f"{config_file} describes no model that transformers can build: {type(error).__name__}: {reason}"
        ) from error
    if layout.depth == 0:
        raise ValueError(f"{config_file} describes a model of 0 layers")


def _without_head(folder: Path, tensors: Mapping[str, StoredTensor], unexpected: Iterable[str]) -> list[str]:
    """Return the unexpected tensors that are weights, and do not belong to the head of a pretraining task.

    An embedding model is the base model alone. Its file may come from pretraining, with a head that is not part of it.
    """
    unexpected = [name for name in unexpected if not _BUFFER.search(name)]
    if not unexpected or loading.task_of(folder) != "embedding":
        return sorted(unexpected)
    prefix = f"{loading.base_prefix(folder)}."
    if not any(name.startswith(prefix) for name in tensors):
        return sorted(unexpected)
    return sorted(name for name in unexpected if name.startswith(prefix))


def _check_tied(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if the config shares a tensor between two names, and the file has two different ones."""
    for name, source in loading.tied_names(folder).items():
        if name not in tensors or source not in tensors:
            continue
        values = []
        for tensor in (name, source):
            with _opened(folder / tensors[tensor].file) as opened:
                values.append(opened.get_tensor(tensor))
        if not torch.equal(*values):
            raise ValueError(
                f"{folder}: config.json ties {name} to {source} (tie_word_embeddings), and the file has different "
                f"values for them: set tie_word_embeddings to false in config.json"
            )


def _refuse_shapes(
    folder: Path, config: Mapping[str, Any], mismatched: Sequence[tuple[str, list[int], list[int]]]
) -> None:
    """Raise ValueError for tensors of another shape, with the keys of the config that have the unexpected sizes."""
    if not mismatched:
        return
    name, stored, expected = mismatched[0]
    sizes = set(expected) - set(stored)
    keys = sorted(f"{key}={value}" for key, value in config.items() if type(value) is int and value in sizes)
    hint = f" ({', '.join(keys)} in config.json)" if keys else ""
    raise ValueError(
        f"{folder} contains {len(mismatched)} tensors of another shape than config.json describes: {name} is "
        f"{stored}, expected {expected}{hint}"
    )


def _refuse(folder: Path, problem: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if not names:
        return
    text = ", ".join(names[:_MAX_NAMES])
    if len(names) > _MAX_NAMES:
        text += f" and {len(names) - _MAX_NAMES} more"
    raise ValueError(f"{folder} {problem}: {text}")
