"""One file, one form that a model is shipped in: `to_NAME.py` writes the format NAME from an artifact."""

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
"""The form that artifacts lie in the store in, which only our own code reads."""

EXPORT_MANIFEST = "export.json"
"""Beside every export: which format it is in."""

_PREFIX = "to_"


class Format(Protocol):
    """What a module `to_NAME.py` offers.

    WEIGHTS: a pattern of the files whose bytes are the size of a model in this form.
    """

    WEIGHTS: str

    def missing(self) -> str | None:
        """What must be installed before this can be written, with the command; None if nothing."""

    def refusal(self, layout: Layout) -> str | None:
        """Why no model of this layout can be written in this form; None if it can."""

    def size_bytes(self, layout: Layout, original: Path) -> int:
        """What the files of WEIGHTS will weigh, to the byte, from shapes and the original's folder alone."""

    def write(self, artifact: Path, out: Path, cache: Path | None) -> None:
        """Write an artifact's model into the empty folder `out`, its tokenizer too.

        cache: a folder for what exports of other artifacts may share; None keeps nothing.
        """


@functools.cache
def names() -> tuple[str, ...]:
    """Every format there is, read from the files of this folder."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        sorted(name.removeprefix(_PREFIX).replace("_", "-") for name in found if name.startswith(_PREFIX))
    )


def load(name: str) -> Format:
    """The format of `jobs/formats/to_NAME.py`; LookupError lists which there are."""
    path = f"{__name__}.{_PREFIX}{name.replace('-', '_')}"
    return cast(Format, module_of("format", name, names(), path))


def check(name: str, layout: Layout) -> None:
    """Refuse, with a ValueError that names the formats that can, a layout that this format cannot hold."""
    reason = load(name).refusal(layout)
    if reason is not None:
        able = [other for other in names() if load(other).refusal(layout) is None]
        raise ValueError(f"{name} cannot hold this model: {reason}; these can: {', '.join(able)}")


def write(name: str, artifact: Path, out: Path, cache: Path | None = None) -> None:
    """Write an artifact as this format into `out`, a folder that does not exist yet; it appears when it is complete.

    Raises ValueError where the format cannot hold it, ModuleNotFoundError with the cure where a library is missing.
    """
    kind = load(name)
    lacking = kind.missing()
    if lacking is not None:
        raise ModuleNotFoundError(lacking)
    layout = Layout.read(artifact)
    check(name, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        kind.write(artifact, made, cache)
        (made / EXPORT_MANIFEST).write_text(json.dumps({"format": name, "task": layout.task}))
        os.replace(made, out)


def export_or_native(name: str, artifact: Path, out: Path, cache: Path | None = None) -> Path:
    """The folder that is shipped: the artifact itself in our own form, else `out`, which it is written to."""
    if name == NATIVE:
        return artifact
    write(name, artifact, out, cache)
    return out


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an export but the mark itself."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / EXPORT_MANIFEST:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[str(file.relative_to(folder))] = digest
    return found


def format_of(folder: Path) -> str:
    """The format that an exported folder is in."""
    file = folder / EXPORT_MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is no export of slimfront: it has no {EXPORT_MANIFEST}")
    return str(json.loads(file.read_text())["format"])


def size_of(folder: Path, name: str) -> int:
    """What the weights of an exported folder weigh, as the file system counts them."""
    pattern = load(name).WEIGHTS
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} holds no {pattern} to weigh")
    return sum(file.stat().st_size for file in files)
