"""Models: the one door to transformers. Finds, loads and writes models, the original's and our own."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from jobs.models.families import Task, family
from jobs.models.layers import PackedEmbedding, linear_of
from jobs.models.layout import FILE as LAYOUT
from jobs.models.layout import Layout, TensorSpec
from jobs.models.model import (
    DTYPE,
    DTYPE_NAMES,
    Model,
    distinct_tensors,
    fit_heads,
    reshape,
    task_of_config,
    written_dtype,
)
from jobs.models.tokenizers import TOKENIZER_FILES, copy_tokenizer

WEIGHTS = "model.safetensors"
VERSIONS = (torch.__version__, transformers.__version__)


class FileState(NamedTuple):
    """Of one file: changed_at is in nanoseconds since 1970."""

    path: str
    size_bytes: int
    changed_at: int


def digest(folder: Path) -> str:
    """The digest of a model's config, weights and tokenizer."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", *TOKENIZER_FILES):
            with file.open("rb") as stream:
                total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def state_of(folder: Path) -> tuple[FileState, ...]:
    """What tells quickly, without reading them, whether the files of a folder are still the same."""
    found = ((file, file.stat()) for file in sorted(folder.iterdir()))
    return tuple(FileState(str(file), state.st_size, state.st_mtime_ns) for file, state in found)


def load(folder: Path, device: str = "cpu") -> Model:
    """The model of a folder, an original's or one that `save` wrote, in bf16, in eval mode, without gradients.

    It lies on the CPU, whatever the device that it is to compute on (see `jobs.models.placement`).
    """
    # Workers load a model for every job.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    if (folder / LAYOUT).is_file():
        layout = Layout.read(folder)
        module = empty_module(config, "cpu")
        model = Model(module, kind, folder)
        reshape(model, layout)
        tensors = load_file(folder / WEIGHTS)
        _check_tensors(folder, tensors, layout)
        module.load_state_dict(tensors, strict=False, assign=True)
        if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
            tie_weights(module)
        fit_heads(model)
    else:
        module = _auto_class(config).from_pretrained(folder, dtype=DTYPE, use_safetensors=True)
        _unite(module)
    module.requires_grad_(False)
    return Model(module.eval(), kind, folder, device)


@lru_cache(maxsize=8)
def computed_bytes(original: Path) -> tuple[int, ...]:
    """What `computed_in` finds in an original, from its config alone. Asked for every candidate, so remembered."""
    return computed_in(empty_module(transformers.AutoConfig.from_pretrained(original), "cpu"))


def computed_in(module: nn.Module) -> tuple[int, ...]:
    """The bytes of each distinct tensor that a model computes for itself and no file holds: masks, sines."""
    held = module.state_dict().keys()
    found = {tensor.numpy().tobytes() for name, tensor in module.named_buffers() if name not in held}
    return tuple(sorted(len(values) for values in found))


def cache_of(blocks: Sequence[tuple[Tensor, Tensor]]) -> transformers.Cache:
    """A KV cache that holds these keys and values, one pair per block."""
    cache = transformers.DynamicCache()
    for keys, values in blocks:
        # Not by `update`: a new layer joins what it is given to a tensor of no dimensions, which graphs cannot hold.
        layer = cast(Any, DynamicLayer)()
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache


def cache_name(module: nn.Module) -> str:
    """Return the name of the KV cache among the arguments and outputs of this model's `forward`.

    transformers 5.24 renamed `past_key_values` to `cache`; each release warns about the other name or ignores it.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def cached(cache: transformers.Cache) -> list[Tensor]:
    """The keys and values of each block in turn."""
    layers = cast(list[Any], cache.layers)
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def original_layout(folder: Path) -> Layout:
    """The layout of an original, from its config alone: no weights are read."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    return Model(empty_module(config, "meta"), kind, folder).layout()


def save(model: Model, folder: Path, about: Mapping[str, Any]) -> None:
    """Write weights, layout, config and tokenizer into an empty or new folder.

    `about` is JSON that says how the model came to be (its recipe); it stands beside the layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(model.blocks)
    widths = _ffn_widths(model.layout())
    if len(widths) == 1:
        setattr(config, model.family.ffn_key, widths.pop())
    config.dtype = DTYPE
    config.save_pretrained(folder)
    copy_tokenizer(model.folder, folder)
    tensors = {
        name: tensor.detach().to("cpu", written_dtype(tensor)).contiguous()
        for name, tensor in distinct_tensors(model.module).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / LAYOUT).write_text(json.dumps({**about, "layout": model.layout().to_dict()}, indent=1))


def about(folder: Path) -> dict[str, Any]:
    """What `save` was told of how the model of this folder came to be; nothing of a model it did not write."""
    file = folder / LAYOUT
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {name: value for name, value in record.items() if name != "layout"}


def config(folder: Path) -> Any:
    """The config of a model folder; it never runs code from the folder."""
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def family_of(folder: Path) -> str:
    """The name of the family of a folder's model."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def task_of(folder: Path) -> Task:
    """What the model of this folder does, by the architecture that its config names."""
    return task_of_config(transformers.AutoConfig.from_pretrained(folder))


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }[task_of_config(config)]


def _unite(module: nn.Module) -> None:
    """Replace GPT-2's Conv1D, a linear that holds its weight transposed, by the linear it is."""
    for name, part in list(module.named_modules()):
        if isinstance(part, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, linear_of(part.weight.T.contiguous(), part.bias))


def empty_module(config: transformers.PretrainedConfig, device: str) -> nn.Module:
    """A module without weights. On the CPU its parameters are memory never touched, and the buffers that
    no file holds (rotary frequencies) are right; on `meta` there are only shapes."""
    with torch.device(device), no_init_weights():
        # In fp32, since some compute buffers (GPT-J's sinusoids) in the dtype that they are made in.
        module = cast(nn.Module, _auto_class(config).from_config(config, dtype=torch.float32))
        for parameter in module.parameters():
            parameter.data = torch.empty_like(parameter, dtype=DTYPE)
    cast(Any, module.config).dtype = DTYPE
    _unite(module)
    tie_weights(module)
    return module


def tie_weights(module: nn.Module) -> None:
    cast(Any, module).tie_weights()


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    held = {name: TensorSpec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    if held != layout.tensors():
        wrong = sorted({name for name, _ in held.items() ^ layout.tensors().items()})[:3]
        raise ValueError(f"{folder / WEIGHTS} does not hold what {LAYOUT} says: {wrong}")


def _ffn_widths(layout: Layout) -> set[int]:
    names = [
        layout.name(block, path)
        for block, one in layout.feed_forwards()
        for path in (one.out, f"{one.out}.v")
    ]
    return {layout.linears[name].in_features for name in names if name in layout.linears}
