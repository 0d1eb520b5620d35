"""Read and write `front.json`, the front in a study's folder."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.persistence.atomic_files import write_json
from orchestrator.study.front_snapshot import FrontSnapshot


def write_front(file: Path, front: FrontSnapshot) -> None:
    """Replace the file."""
    write_json(file, front.to_dict())


def read_front(file: Path) -> FrontSnapshot:
    """Read the file. Raises FileNotFoundError if the study has written none yet."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: {file.parent} is not the folder of a study, or the original is not measured yet"
        )
    return FrontSnapshot.from_dict(json.loads(file.read_text()))
