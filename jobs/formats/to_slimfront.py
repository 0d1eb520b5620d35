"""The format `slimfront`: the artifact as it is, which the runtime `torch` runs with our own code."""

from __future__ import annotations

import shutil
from pathlib import Path

from jobs.models.layout import Layout

WEIGHTS = "*.safetensors"


def missing() -> str | None:
    return None


def refusal(layout: Layout) -> str | None:
    return None


def size_bytes(layout: Layout, original: Path) -> int:
    return layout.size_bytes()


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    # The store's files may be shared links: what leaves it is a copy of its own.
    shutil.copytree(artifact, out, copy_function=shutil.copyfile, dirs_exist_ok=True)
