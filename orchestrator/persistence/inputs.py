"""Inputs of a study that are too large for its package and travel through its store.

An input in a store has an address: `artifact:DIGEST-BYTES` for a folder, `artifact:DIGEST-BYTES/NAME` for a file. Each
machine that needs it fetches it once, into the folder `inputs` next to the studies.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.manifest import ArtifactRef, Entry, link_or_copy, manifest
from cluster.storage.open import open_store
from cluster.storage.store import ArtifactStore
from jobs.materials import Materials

FOLDER = "inputs"
SCHEME = "artifact:"
_ADDRESS = re.compile(r"artifact:([0-9a-f]{64})-([0-9]+)(/[^/]+)?")


@dataclass(frozen=True)
class StoredInput:
    """An input as an artifact of a store."""

    ref: ArtifactRef
    files: Mapping[str, Path]
    """The files on this machine by their names in the artifact."""
    name: str | None
    """The name of the file if the input is a single file; None for a folder."""

    @property
    def address(self) -> str:
        folder = f"{SCHEME}{_folder_name(self.ref)}"
        return folder if self.name is None else f"{folder}/{self.name}"

    def put(self, store: ArtifactStore) -> None:
        """Store the input unless the store has it. Raises OSError if a file has changed since it was digested."""
        if store.has(self.ref):
            return
        with tempfile.TemporaryDirectory(prefix="slimfront-") as folder:
            for name, file in self.files.items():
                link_or_copy(file.resolve(), Path(folder) / name)
            if store.put(Path(folder)) != self.ref:
                raise OSError("a file of the study changed while it was sent: submit it again")


def stored_input(files: Mapping[str, Path], sha256: Mapping[str, str], name: str | None) -> StoredInput:
    """Return the stored input of these files.

    files, sha256: files and their SHA-256 digests by their names in the artifact. name: see `StoredInput.name`.
    """
    entries = [Entry(inner, file.stat().st_size, sha256[inner]) for inner, file in files.items()]
    return StoredInput(manifest(entries), files, name)


def bring(materials: Materials, store: ArtifactStore, home: Path) -> None:
    """Fetch the stored inputs among the materials that this machine lacks. Raises LookupError if the store lost one."""
    for path in _input_paths(materials):
        if Path(path).is_relative_to(home / FOLDER):
            folder = home / FOLDER / Path(path).relative_to(home / FOLDER).parts[0]
            _fetch_once(_ref(folder.name), store, folder)


def _input_paths(materials: Materials) -> Iterable[str]:
    """Return the paths that the materials name."""
    paths = [materials.model, materials.choices, materials.labelled]
    if materials.tasks is not None:
        paths.append(materials.tasks.folder)
    for text in (materials.evaluation, materials.calibration, materials.training):
        if text is not None:
            paths.append(text.path)
    return [path for path in paths if path]


def fetch_input(address: str, store: str, folder: Path) -> Path:
    """Fetch the input of this address into a folder of `folder`, and return its path. Raises ValueError for any other
    text."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}, which is no input's address")
    target = folder / f"{match[1]}-{match[2]}"
    _fetch_once(_ref(target.name), open_store(store), target)
    return target / (match[3] or "").removeprefix("/")


def _fetch_once(ref: ArtifactRef, store: ArtifactStore, folder: Path) -> None:
    """Fetch an input into its folder. Several processes may do so at the same time; the first to finish wins."""
    if folder.is_dir():
        return
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        store.fetch(ref, staged)
        staged.rename(folder)
    except LookupError:
        raise LookupError(f"the store has no input {ref.digest[:12]}: submit the study again") from None
    except OSError:
        if not folder.is_dir():  # no other process was first
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _folder_name(ref: ArtifactRef) -> str:
    return f"{ref.digest}-{ref.size_bytes}"


def _ref(name: str) -> ArtifactRef:
    digest, _, size_bytes = name.partition("-")
    return ArtifactRef(digest, int(size_bytes))
