"""The format `slimfront`: an unchanged copy of the artifact, which the runtime `torch` runs."""

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
    # Files in the store may be hard links: an export must not share them.
    shutil.copytree(artifact, out, copy_function=shutil.copyfile, dirs_exist_ok=True)
