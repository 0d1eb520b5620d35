"""Checkpoints: what a training needs to go on after an interruption, as files that its first rank writes and reads.

They hold whole tensors in safetensors, so that any number of ranks, at any ZeRO stage, can go on from them.
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
"""In the folder of checkpoints: names the one that counts. It is replaced when that one is complete."""
_FORM = 2
"""Another form's checkpoints are taken for none."""
_PART_BYTES = 2**28
"""So many bytes of tensors are held before they are written to a file."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a training leaves what it needs to go on after an interruption, after each `every` steps.

    folder: this training's own; it must outlive the attempt, and the caller removes it. Only the first rank needs it.
        A checkpoint holds 12 bytes for each trained weight, and the last one stays until the next is complete.
    """

    folder: Path
    every: int

    def write(self, course: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """course: plain JSON, with the number of steps as `done`. tensors: taken one by one."""
        before = self._marker()
        self.folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: an attempt that was given up may still be writing beside this one.
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"step-{course['done']}-"))
        waiting: dict[str, Tensor] = {}
        parts = 0
        for name, tensor in tensors:
            waiting[name] = tensor
            if sum(one.nbytes for one in waiting.values()) >= _PART_BYTES:
                parts = _write_part(folder, parts, waiting)
        _write_part(folder, parts, waiting)
        beside = folder / MARKER
        beside.write_text(json.dumps({"form": _FORM, "folder": folder.name, **course}))
        os.replace(beside, self.folder / MARKER)
        if before is not None:
            shutil.rmtree(self.folder / before["folder"], ignore_errors=True)

    def read(self) -> Checkpoint | None:
        """The last one that is complete; None where there is none."""
        marker = self._marker()
        if marker is None or marker.get("form") != _FORM:
            return None
        found: dict[str, Any] = {}
        for file in sorted((self.folder / marker["folder"]).glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            found |= dict.fromkeys(opened.keys(), opened)
        return Checkpoint(marker, found)

    def _marker(self) -> dict[str, Any] | None:
        if not (self.folder / MARKER).is_file():
            return None
        marker: dict[str, Any] = json.loads((self.folder / MARKER).read_text())
        return marker


@dataclass(frozen=True)
class Checkpoint:
    """One that was read. files: which one holds a tensor."""

    course: dict[str, Any]
    files: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor

    def names(self, kind: str) -> list[str]:
        """The names, without the kind itself, of the tensors named `KIND.NAME`."""
        return [name.removeprefix(f"{kind}.") for name in self.files if name.startswith(f"{kind}.")]


def _write_part(folder: Path, parts: int, waiting: dict[str, Tensor]) -> int:
    """Write and forget what waits; how many parts there are then."""
    save_file(waiting, folder / f"{parts:05}.safetensors")
    waiting.clear()
    return parts + 1
