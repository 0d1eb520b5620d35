"""Inputs: the files and folders that a study reads. Those too large for a package travel through its store.

One that lies in a store has an address: `artifact:DIGEST-BYTES` for a folder, `artifact:DIGEST-BYTES/NAME` for a file.
Each machine that needs it fetches it once, into `inputs` beside the studies.
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
    """An input to be kept in a store. files: of this machine, by their names in the artifact."""

    ref: ArtifactRef
    files: Mapping[str, Path]
    name: str | None

    @property
    def address(self) -> str:
        return f"{SCHEME}{_folder(self.ref)}" + (f"/{self.name}" if self.name else "")

    def put(self, store: ArtifactStore) -> None:
        """Keep it, unless it is held already."""
        if store.has(self.ref):
            return
        with tempfile.TemporaryDirectory(prefix="slimfront-") as folder:
            for name, file in self.files.items():
                link_or_copy(file.resolve(), Path(folder) / name)
            if store.put(Path(folder)) != self.ref:
                raise OSError("a file of the study changed while it was sent: submit it again")


def stored(files: Mapping[str, Path], sha256: Mapping[str, str], name: str | None) -> StoredInput:
    """The input that these files make, whose SHA-256 are known. name: of the single file that it is, or None."""
    entries = [Entry(inner, file.stat().st_size, sha256[inner]) for inner, file in files.items()]
    return StoredInput(manifest(entries), files, name)


def bring(materials: Materials, store: ArtifactStore, home: Path) -> None:
    """Fetch what of the materials is stored inputs and not on this machine yet. LookupError where the store lost it."""
    for path in _read(materials):
        if Path(path).is_relative_to(home / FOLDER):
            folder = home / FOLDER / Path(path).relative_to(home / FOLDER).parts[0]
            _lay(_ref(folder.name), store, folder)


def _read(materials: Materials) -> Iterable[str]:
    texts = (materials.evaluation, materials.calibration, materials.training)
    tasks = materials.tasks
    every = [materials.model, materials.choices, materials.labelled, tasks and tasks.folder]
    return [path for path in (*every, *(text.path for text in texts if text is not None)) if path]


def fetch_input(address: str, store: str, folder: Path) -> Path:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}, which is no input's address")
    place = folder / f"{match[1]}-{match[2]}"
    _lay(_ref(place.name), open_store(store), place)
    return place / (match[3] or "").removeprefix("/")


def _lay(ref: ArtifactRef, store: ArtifactStore, folder: Path) -> None:
    """Fetch an input into its folder, where many processes may want it at once."""
    if folder.is_dir():
        return
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        store.fetch(ref, staged)
        staged.rename(folder)
    except LookupError:
        raise LookupError(f"input {ref.digest[:12]} is gone from the store: submit the study again") from None
    except OSError:
        if not folder.is_dir():  # nobody else was first
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _folder(ref: ArtifactRef) -> str:
    return f"{ref.digest}-{ref.size_bytes}"


def _ref(name: str) -> ArtifactRef:
    digest, _, size_bytes = name.partition("-")
    return ArtifactRef(digest, int(size_bytes))
