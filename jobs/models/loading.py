"""Load and write models, originals and artifacts. This folder is the one door to transformers."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.models.facts import remembered
from jobs.models.families import Task, family
from jobs.models.layers import PackedEmbedding, linear_of
from jobs.models.layout import LAYOUT_FILE, Layout, TensorSpec
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

if TYPE_CHECKING:
    import transformers  # elsewhere inside functions: its import takes a second, and many commands need no model

WEIGHTS = "model.safetensors"
VERSIONS = (torch.__version__, importlib.metadata.version("transformers"))
"""Versions of the libraries that decide how a model is computed."""


class FileState(NamedTuple):
    """The size and the time of the last change of a file: equal as long as the file is the same."""

    path: str
    size_bytes: int
    changed_at: int
    """Nanoseconds since 1970."""


def digest(folder: Path) -> str:
    """Return the digest of a model's config, weights and tokenizer."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", *TOKENIZER_FILES):
            with file.open("rb") as stream:
                total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def file_states(folder: Path) -> tuple[FileState, ...]:
    """Return the state of every file of a folder, to detect changes without reading the files."""
    stats = ((file, file.stat()) for file in sorted(folder.iterdir()))
    return tuple(FileState(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def load(folder: Path, device: str = "cpu") -> Model:
    """Load a model, an original or an artifact that `save` wrote, in bf16, in eval mode, without gradients.

    device: the device it computes on; it is loaded to the CPU (see `jobs.models.placement`). Raises ValueError if the
    weights of an artifact do not match its layout.
    """
    import transformers

    # Workers load a model for every job: progress bars would fill their logs.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    if (folder / LAYOUT_FILE).is_file():
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
        module, report = _auto_class(config).from_pretrained(
            folder, config=config, dtype=DTYPE, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"{folder} lacks the weights of {sorted(report['missing_keys'])[:3]}")
        _replace_conv1d(module)
    module.requires_grad_(False)
    return Model(module.eval(), kind, folder, device)


def differences(folder: Path) -> dict[str, Any]:
    """Compare the weight files of an original with the parameters of its architecture, as transformers matches them.

    Returns the names of `missing` and `unexpected` tensors, and for each `mismatched` one its name, its shape in the
    file and the shape that the architecture expects. Reads headers only: the module is on the meta device.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would print the same differences as a table
    try:
        config = load_config(folder)
        _, report = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=DTYPE,
            use_safetensors=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    mismatched = sorted(
        (name, list(stored), list(expected)) for name, stored, expected in report["mismatched_keys"]
    )
    return {
        "missing": sorted(set(report["missing_keys"]) - {name for name, *_ in mismatched}),
        "unexpected": sorted(report["unexpected_keys"]),
        "mismatched": mismatched,
    }


def base_prefix(folder: Path) -> str:
    """Return the prefix of the base model's tensors in files of a model with a head, such as `bert`."""
    config = load_config(folder)
    return str(_auto_class(config)._model_mapping[type(config)].base_model_prefix)


def tied_names(folder: Path) -> dict[str, str]:
    """Return the tensors that share their values with another tensor by the config, and the names of the others."""

    def compute() -> dict[str, str]:
        module = empty_module(load_config(folder), "meta")
        return dict(getattr(module, "all_tied_weights_keys", None) or {})

    return dict(remembered("tied", [_config_text(folder)], compute))


@lru_cache(maxsize=8)
def computed_constant_bytes(original: Path) -> tuple[int, ...]:
    """Return `computed_constant_bytes_of` an original, from its config alone.

    The result is cached, since the size of every candidate depends on it.
    """

    def compute() -> tuple[int, ...]:
        return computed_constant_bytes_of(empty_module(load_config(original), "cpu"))

    return tuple(remembered("constants", [_config_text(original)], compute))


def computed_constant_bytes_of(module: nn.Module) -> tuple[int, ...]:
    """Return the sorted sizes of the distinct buffers that a model computes and no file stores: masks, sines."""
    stored = module.state_dict().keys()
    buffers = {tensor.numpy().tobytes() for name, tensor in module.named_buffers() if name not in stored}
    return tuple(sorted(len(values) for values in buffers))


def cache_with(blocks: Sequence[tuple[Tensor, Tensor]]) -> transformers.Cache:
    """Return a KV cache of these keys and values, one pair per block."""
    import transformers
    from transformers.cache_utils import DynamicLayer

    cache = transformers.DynamicCache()
    for keys, values in blocks:
        # `update` would concatenate them with a tensor of no dimensions, which graphs cannot represent.
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


def cached_tensors(cache: transformers.Cache) -> list[Tensor]:
    """Return the keys and values of a KV cache, block after block."""
    layers = cast(list[Any], cache.layers)
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def original_layout(folder: Path) -> Layout:
    """Return the layout of an original from its config alone, without reading weights."""

    def compute() -> dict[str, Any]:
        config = load_config(folder)
        return Model(empty_module(config, "meta"), family(config.model_type), folder).layout().to_dict()

    return Layout.from_dict(remembered("layout", [_config_text(folder)], compute))


def save(model: Model, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write weights, layout, config and tokenizer into an empty or new folder.

    provenance: JSON values that describe how the model was made (its recipe), stored next to the layout; see
    `read_provenance`.
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
    (folder / LAYOUT_FILE).write_text(
        json.dumps({**provenance, "layout": model.layout().to_dict()}, indent=1)
    )


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the provenance that `save` wrote; empty for an original."""
    file = folder / LAYOUT_FILE
    if not file.is_file():
        return {}
    record: dict[str, Any] = json.loads(file.read_text())
    return {name: value for name, value in record.items() if name != "layout"}


def load_config(folder: Path) -> Any:
    """Return the config of a model folder. Never runs code from the folder."""
    import transformers

    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def max_positions(folder: Path) -> int | None:
    """Return the number of tokens that a model can read at once; None if its config states no limit.

    RoBERTa numbers positions from behind the id of its padding token, so fewer remain than its table has rows.
    """

    def compute() -> int | None:
        config = load_config(folder)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return None
        if config.model_type == "roberta":
            return int(positions) - int(config.pad_token_id) - 1
        return int(positions)

    limit = remembered("positions", [_config_text(folder)], compute)
    return None if limit is None else int(limit)


def family_of(folder: Path) -> str:
    """Return the name of the family of a model folder."""
    return str(json.loads(_config_text(folder))["model_type"])


def task_of(folder: Path) -> Task:
    """Return the task of a model folder, by the architecture that its config names."""
    config = json.loads(_config_text(folder))
    return task_of_config(
        SimpleNamespace(architectures=config.get("architectures"), model_type=config["model_type"])
    )


def _config_text(folder: Path) -> str:
    return (folder / "config.json").read_text(encoding="utf-8")


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    import transformers

    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }[task_of_config(config)]


def _replace_conv1d(module: nn.Module) -> None:
    """Replace each of GPT-2's Conv1D, linears with a transposed weight, by an `nn.Linear`."""
    from transformers.pytorch_utils import Conv1D

    for name, part in list(module.named_modules()):
        if isinstance(part, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, linear_of(part.weight.T.contiguous(), part.bias))


def empty_module(config: transformers.PretrainedConfig, device: str) -> nn.Module:
    """Return a module of this config without weights.

    On the CPU its parameters are uninitialized bf16 memory, and the buffers that no file stores (rotary frequencies)
    have their values; on `meta` there are only shapes.
    """
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        # In fp32, since some families compute buffers (GPT-J's sinusoids) in the module's dtype.
        module = cast(nn.Module, _auto_class(config).from_config(config, dtype=torch.float32))
        for parameter in module.parameters():
            parameter.data = torch.empty_like(parameter, dtype=DTYPE)
    cast(Any, module.config).dtype = DTYPE
    _replace_conv1d(module)
    tie_weights(module)
    return module


def tie_weights(module: nn.Module) -> None:
    """Make the head share the token embedding's weight if the config says so."""
    cast(Any, module).tie_weights()


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    specs = {
        name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    expected = layout.tensors()
    if specs != expected:
        names = sorted({name for name, _ in specs.items() ^ expected.items()})[:3]
        raise ValueError(f"{folder / WEIGHTS} does not match {LAYOUT_FILE}; the tensors {names} differ")


def _ffn_widths(layout: Layout) -> set[int]:
    """Return the numbers of intermediate neurons of the feed-forward networks."""
    widths = set()
    for block, network in layout.feed_forwards():
        out = layout.name(block, network.out)
        for name in (out, f"{out}.v"):
            if name in layout.linears:
                widths.add(layout.linears[name].in_features)
    return widths
