"""A store in a folder of the local file system."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.storage.manifest import (
    CHUNK_BYTES,
    DIGEST_PATTERN,
    ArtifactRef,
    DamagedError,
    Entry,
    check_digest,
    check_key,
    check_prefix,
    entry_of,
    files_of,
    link_or_copy,
    manifest,
    plain_files,
)
from cluster.storage.store import Holdings, StoredArtifact

LEFTOVER_SECONDS = 24 * 3600.0
"""What a writer has not touched for so long, it left when it was killed."""


class LocalStore:
    """A store in a folder, for all processes that see it: on one machine, or on a shared file system.

        objects/ab/abcd…/…          an artifact's files, read-only
        records/results/0123.json   a record
        tmp/                        what is being written, or was when its writer was killed

    Everything is written under tmp/, synced, and then appears under its name at once, by a rename or a
    hard link. A record's folder is not synced: a machine that loses power may lose the records of its last seconds,
    each as a whole, and their jobs run again (docs/decisions/one-sync.md). What killed writers left is removed a
    day later, when the store is next opened. The time of an artifact's folder is that of its last use.
    """

    FOLDERS = ("objects", "records", "tmp")

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        for name in self.FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.sweep(LEFTOVER_SECONDS)

    def put(self, folder: Path) -> ArtifactRef:
        files = files_of(folder)
        staged = self._temporary()
        try:
            staged.mkdir()
            ref = manifest(_copy(folder, name, staged) for name in files)
            place = self._object(ref)
            if not place.exists():
                _reveal(staged, place)
            _touch(place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return ref

    def lay(self, ref: ArtifactRef, write: Callable[[Path], None]) -> None:
        """Hold as `ref` what `write` lays out in the folder that it is given. Its content is checked when it is
        fetched, not now."""
        place, staged = self._object(ref), self._temporary()
        try:
            staged.mkdir()
            write(staged)
            _reveal(staged, place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Lays out hard links, or copies where the folder is on another file system.

        Every byte is hashed each time: some 0.2 s for 270 MB, which are read next anyway. A link shares its
        bytes with the store, so whoever writes through one (root may, in spite of the mode) would
        otherwise change what everyone after measures.
        """
        if os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists; an artifact is fetched into a new folder")
        held = self._object(ref)
        if not held.is_dir():
            raise LookupError(f"artifact {ref.digest} is not held in {self.root}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
        try:
            staged.mkdir()
            for name in plain_files(held):
                link_or_copy(held / name, staged / name)
            found = manifest(entry_of(staged, name) for name in plain_files(staged))
            if found != ref:
                raise DamagedError(
                    f"artifact {ref.digest} in {self.root} is damaged; remove it, so that it is made again"
                )
            staged.rename(folder)
            _touch(held)
        except FileNotFoundError as error:
            raise LookupError(f"artifact {ref.digest} was removed from {self.root} meanwhile") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def has(self, ref: ArtifactRef) -> bool:
        return self._object(ref).is_dir()

    def remove(self, ref: ArtifactRef) -> None:
        gone = self._temporary()
        try:
            self._object(ref).rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        place = self._record(key)
        content = json.dumps(dict(record), allow_nan=False, sort_keys=True).encode()
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = self._temporary()
        try:
            with staged.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # A link appears with all its content, and only if absent; O_EXCL would show a half-written file.
            os.link(staged, place)
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
        return True

    def record(self, key: str) -> dict[str, Any] | None:
        try:
            content = self._record(key).read_bytes()
        except FileNotFoundError:
            return None
        loaded: dict[str, Any] = json.loads(content)
        return loaded

    def records(self, prefix: str) -> Iterator[str]:
        top = self.root / "records"
        start = top / check_prefix(prefix).rpartition("/")[0]
        keys = (file.relative_to(top).as_posix().removesuffix(".json") for file in start.rglob("*.json"))
        yield from sorted(key for key in keys if key.startswith(prefix))

    def forget(self, key: str) -> None:
        place = self._record(key)
        try:
            place.unlink()
        except FileNotFoundError:
            return
        _sync_folder(place.parent)

    def holdings(self) -> Holdings:
        objects = (
            folder for folder in (self.root / "objects").glob("*/*") if DIGEST_PATTERN.fullmatch(folder.name)
        )
        records = _sizes(self.root / "records")
        return Holdings(
            artifacts=tuple(held for folder in objects if (held := _held(folder)) is not None),
            records=len(records),
            records_bytes=sum(records),
            unfinished_bytes=sum(_sizes(self.root / "tmp")),
        )

    def sweep(self, seconds: float) -> None:
        for leftover in (self.root / "tmp").iterdir():
            try:
                old = time.time() - leftover.lstat().st_mtime > seconds
                if old and leftover.is_dir():
                    shutil.rmtree(leftover)
                elif old:
                    leftover.unlink()
            except FileNotFoundError:
                continue  # its writer has ended, or another process sweeps too

    def _object(self, ref: ArtifactRef) -> Path:
        digest = check_digest(ref.digest)
        return self.root / "objects" / digest[:2] / digest

    def _record(self, key: str) -> Path:
        return self.root / "records" / f"{check_key(key)}.json"

    def _temporary(self) -> Path:
        return self.root / "tmp" / uuid.uuid4().hex


def _sizes(folder: Path) -> list[int]:
    """Of all files below; what vanishes meanwhile is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.lstat(os.path.join(parent, name)).st_size)
    return found


def _held(folder: Path) -> StoredArtifact | None:
    """The artifact of this folder; None where it was removed meanwhile."""
    try:
        used_at = folder.stat().st_mtime
    except FileNotFoundError:
        return None
    return StoredArtifact(ArtifactRef(folder.name, sum(_sizes(folder))), used_at)


def _touch(folder: Path) -> None:
    """Note that an artifact is used now, where that may be noted: not in another user's store."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _copy(source: Path, name: str, target: Path) -> Entry:
    """Copy one file, read-only and synced, and hash what was written in the same pass."""
    place = target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with (source / name).open("rb") as reader, place.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            sha256.update(chunk)
            writer.write(chunk)
        os.fchmod(writer.fileno(), 0o444)
        writer.flush()
        os.fsync(writer.fileno())
        return Entry(name, writer.tell(), sha256.hexdigest())


def _reveal(staged: Path, place: Path) -> None:
    """Let a complete folder appear under its name. Another writer may be first: its content is the same."""
    for parent, _, _ in os.walk(staged):
        _sync_folder(Path(parent))
    place.parent.mkdir(exist_ok=True)
    try:
        staged.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
