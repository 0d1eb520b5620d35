"""Write files that are complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file whole (see `write_whole`)."""
    write_whole(file, json.dumps(content, indent=1, allow_nan=False))


def write_whole(file: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old content or the new content."""
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text)
    os.replace(draft, file)
