"""Checkpoints: files from which an interrupted training resumes. The first rank writes and reads them.

They contain whole tensors in safetensors, so that any number of ranks can resume at any ZeRO stage.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MARKER = "checkpoint.json"
"""The file in a folder of checkpoints that names the current one. It is replaced when a checkpoint is complete."""
_FORM = 2
"""The version of the files. Checkpoints of another version are ignored."""
_PART_BYTES = 2**28
"""Bytes of tensors that are collected in memory before they are written to a file."""


@dataclass(frozen=True)
class Checkpoints:
    """The folder and the interval of a training's checkpoints."""

    folder: Path
    """Belongs to one training. It must outlive the attempt, and the caller removes it. Only the first rank needs it. A
    checkpoint has 12 bytes for each trained weight, and the previous one stays until the next is complete."""
    interval: int
    """Steps between two checkpoints."""

    def write(self, course: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a checkpoint and remove the previous one.

        course: plain JSON data, with the number of steps as `done`. tensors: consumed one by one.
        """
        previous = self._marker()
        self.folder.mkdir(parents=True, exist_ok=True)
        # The name is unique: an attempt that was given up may still be writing.
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"step-{course['done']}-"))
        pending: dict[str, Tensor] = {}
        parts = 0
        for name, tensor in tensors:
            pending[name] = tensor
            if sum(waiting.nbytes for waiting in pending.values()) >= _PART_BYTES:
                parts = _write_part(folder, parts, pending)
        _write_part(folder, parts, pending)
        draft = folder / MARKER
        draft.write_text(json.dumps({"form": _FORM, "folder": folder.name, **course}))
        os.replace(draft, self.folder / MARKER)
        if previous is not None:
            shutil.rmtree(self.folder / previous["folder"], ignore_errors=True)

    def read(self) -> Checkpoint | None:
        """Return the last complete checkpoint; None if there is none."""
        marker = self._marker()
        if marker is None or marker.get("form") != _FORM:
            return None
        files: dict[str, Any] = {}
        for file in sorted((self.folder / marker["folder"]).glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
        return Checkpoint(marker, files)

    def _marker(self) -> dict[str, Any] | None:
        if not (self.folder / MARKER).is_file():
            return None
        marker: dict[str, Any] = json.loads((self.folder / MARKER).read_text())
        return marker


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open for reading."""

    course: dict[str, Any]
    """The settings and losses of the training, as they were written."""
    files: dict[str, Any]
    """The open file that contains each tensor, by the tensor's name."""

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors `KIND.NAME`, without the kind."""
        return [name.removeprefix(f"{kind}.") for name in self.files if name.startswith(f"{kind}.")]


def _write_part(folder: Path, parts: int, pending: dict[str, Tensor]) -> int:
    """Write the pending tensors, clear them, and return the number of written parts."""
    save_file(pending, folder / f"{parts:05}.safetensors")
    pending.clear()
    return parts + 1
