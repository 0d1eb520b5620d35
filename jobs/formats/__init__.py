"""Export formats, one file each: `to_NAME.py` writes an artifact's model in the format NAME."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pkgutil
import tempfile
from pathlib import Path
from typing import Protocol, cast

from jobs.models.layout import Layout
from jobs.plugins import module_of

NATIVE = "slimfront"
"""The format of artifacts in the store, which only slimfront reads."""

EXPORT_MANIFEST = "export.json"
"""The file of an export that states its format and its task."""

_PREFIX = "to_"


class Format(Protocol):
    """The interface of a module `to_NAME.py`."""

    WEIGHTS: str
    """Pattern of the files that count as the size of a model in this format."""

    def missing(self) -> str | None:
        """Return which library must be installed to write this format, with the command; None if none is missing."""

    def refusal(self, layout: Layout) -> str | None:
        """Return why a model of this layout cannot be written in this format; None if it can."""

    def size_bytes(self, layout: Layout, original: Path) -> int:
        """Return the exact size of the files of WEIGHTS, from the layout and the original's folder alone."""

    def write(self, artifact: Path, out: Path, cache: Path | None) -> None:
        """Write an artifact's model and tokenizer into the empty folder `out`.

        cache: a folder for files that exports of other artifacts can reuse; None to keep none.
        """


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all formats, from the files of this folder."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    formats = [name.removeprefix(_PREFIX) for name in modules if name.startswith(_PREFIX)]
    return tuple(sorted(name.replace("_", "-") for name in formats))


def load(name: str) -> Format:
    """Return the format of `jobs/formats/to_NAME.py`; raise LookupError, which lists all formats, if there is none."""
    path = f"{__name__}.{_PREFIX}{name.replace('-', '_')}"
    return cast(Format, module_of("format", name, names(), path))


def check(name: str, layout: Layout) -> None:
    """Raise ValueError, which lists the formats that can, if this format cannot represent a layout."""
    reason = load(name).refusal(layout)
    if reason is not None:
        able = [candidate for candidate in names() if load(candidate).refusal(layout) is None]
        raise ValueError(f"{name} cannot hold this model: {reason}; these can: {', '.join(able)}")


def write(name: str, artifact: Path, out: Path, cache: Path | None = None) -> None:
    """Write an artifact in this format into the new folder `out`, which appears only when it is complete.

    Raises ValueError if the format cannot represent the model, ModuleNotFoundError if a library is not installed.
    """
    kind = load(name)
    missing = kind.missing()
    if missing is not None:
        raise ModuleNotFoundError(missing)
    layout = Layout.read(artifact)
    check(name, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        draft = Path(scratch) / "export"
        draft.mkdir()
        kind.write(artifact, draft, cache)
        (draft / EXPORT_MANIFEST).write_text(json.dumps({"format": name, "task": layout.task}))
        os.replace(draft, out)


def export_or_native(name: str, artifact: Path, out: Path, cache: Path | None = None) -> Path:
    """Return the folder to ship: the artifact itself for the native format, otherwise `out` after writing to it."""
    if name == NATIVE:
        return artifact
    write(name, artifact, out, cache)
    return out


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an export, by relative path, without that of the manifest."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / EXPORT_MANIFEST:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            digests[str(file.relative_to(folder))] = digest
    return digests


def format_of(folder: Path) -> str:
    """Return the format of an exported folder."""
    file = folder / EXPORT_MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is not an export of slimfront: it has no {EXPORT_MANIFEST}")
    return str(json.loads(file.read_text())["format"])


def size_of(folder: Path, name: str) -> int:
    """Return the bytes of the weight files of an exported folder."""
    pattern = load(name).WEIGHTS
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} contains no weight files {pattern}")
    return sum(file.stat().st_size for file in files)
