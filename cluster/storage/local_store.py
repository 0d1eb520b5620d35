"""LocalStore: a store in a folder of the local file system."""

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
"""A file under tmp/ that was not touched for this time belongs to a writer that was killed."""


class LocalStore:
    """A store in a folder, for all processes that see it: on one machine, or on a shared file system.

        objects/ab/abcd…/…          an artifact's files, read-only
        records/results/0123.json   a record
        tmp/                        writes in progress, and those whose writer was killed

    Every write is made under tmp/, synced, and then appears under its name at once, by a rename or a hard link. A
    record's folder is not synced: a machine that loses power may lose the records of its last seconds, each as a whole,
    and their jobs run again (docs/decisions/one-sync.md). The modification time of an artifact's folder is that of its
    last use.
    """

    FOLDERS = ("objects", "records", "tmp")

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def ensure(self) -> None:
        for name in self.FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def put(self, folder: Path) -> ArtifactRef:
        files = files_of(folder)
        with self._staged_folder() as staged:
            ref = manifest(_copy(folder, name, staged) for name in files)
            target = self._object(ref)
            if not target.exists():
                _publish(staged, target)
            _touch(target)
        return ref

    def add(self, ref: ArtifactRef, write: Callable[[Path], None]) -> None:
        """Store as `ref` the files that `write` creates in the folder it is called with.

        The content is checked when it is fetched, not now.
        """
        with self._staged_folder() as staged:
            write(staged)
            _publish(staged, self._object(ref))

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Create hard links, or copies if the folder is on another file system.

        Every byte is hashed each time: some 0.2 s for 270 MB, which the caller reads next anyway. A link shares its
        bytes with the store, so a process that writes through a link (root may, in spite of the mode) would otherwise
        change later measurements.
        """
        if os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists; an artifact is fetched into a new folder")
        source = self._object(ref)
        if not source.is_dir():
            raise LookupError(f"artifact {ref.digest} is not in {self.root}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
        try:
            staged.mkdir()
            for name in plain_files(source):
                link_or_copy(source / name, staged / name)
            content = manifest(entry_of(staged, name) for name in plain_files(staged))
            if content != ref:
                raise DamagedError(
                    f"artifact {ref.digest} in {self.root} is damaged; remove it, so that it is made again"
                )
            staged.rename(folder)
            _touch(source)
        except FileNotFoundError as error:
            raise LookupError(f"artifact {ref.digest} was removed from {self.root} meanwhile") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def has(self, ref: ArtifactRef) -> bool:
        return self._object(ref).is_dir()

    def remove(self, ref: ArtifactRef) -> None:
        source = self._object(ref)
        if not source.is_dir():
            return
        removed = self._temporary()
        try:
            source.rename(removed)
        except FileNotFoundError:
            return
        shutil.rmtree(removed, ignore_errors=True)

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        target = self._record(key)
        content = json.dumps(dict(record), allow_nan=False, sort_keys=True).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = self._temporary()
        try:
            with staged.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # A link appears with all its content, and only if absent; O_EXCL would show a half-written file.
            os.link(staged, target)
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
        target = self._record(key)
        try:
            target.unlink()
        except FileNotFoundError:
            return
        _sync_folder(target.parent)

    def holdings(self) -> Holdings:
        artifacts = []
        for folder in (self.root / "objects").glob("*/*"):
            if DIGEST_PATTERN.fullmatch(folder.name):
                artifact = _stored_artifact(folder)
                if artifact is not None:
                    artifacts.append(artifact)
        records = _sizes(self.root / "records")
        return Holdings(
            artifacts=tuple(artifacts),
            records=len(records),
            records_bytes=sum(records),
            unfinished_bytes=sum(_sizes(self.root / "tmp")),
        )

    def sweep(self, seconds: float) -> None:
        for leftover in (self.root / "tmp").glob("*"):
            try:
                is_old = time.time() - leftover.lstat().st_mtime > seconds
                if is_old and leftover.is_dir():
                    shutil.rmtree(leftover)
                elif is_old:
                    leftover.unlink()
            except FileNotFoundError:
                continue  # its writer has ended, or another process sweeps too

    def _object(self, ref: ArtifactRef) -> Path:
        digest = check_digest(ref.digest)
        return self.root / "objects" / digest[:2] / digest

    def _record(self, key: str) -> Path:
        return self.root / "records" / f"{check_key(key)}.json"

    def _temporary(self) -> Path:
        """Return a new path under tmp/."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex

    @contextlib.contextmanager
    def _staged_folder(self) -> Iterator[Path]:
        """Create a folder under tmp/, and remove it at the end of the block unless it was moved."""
        staged = self._temporary()
        try:
            staged.mkdir()
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _sizes(folder: Path) -> list[int]:
    """Return the sizes of all files below; files that vanish meanwhile are left out."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.lstat(os.path.join(parent, name)).st_size)
    return sizes


def _stored_artifact(folder: Path) -> StoredArtifact | None:
    """Return the artifact of this folder; None if it was removed meanwhile."""
    try:
        used_at = folder.stat().st_mtime
    except FileNotFoundError:
        return None
    return StoredArtifact(ArtifactRef(folder.name, sum(_sizes(folder))), used_at)


def _touch(folder: Path) -> None:
    """Note that an artifact is used now. Another user's store may not allow that."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _copy(source: Path, name: str, target: Path) -> Entry:
    """Copy one file, read-only and synced; return its description, hashed in the same pass."""
    file = target / name
    file.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with (source / name).open("rb") as reader, file.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            sha256.update(chunk)
            writer.write(chunk)
        os.fchmod(writer.fileno(), 0o444)
        writer.flush()
        os.fsync(writer.fileno())
        return Entry(name, writer.tell(), sha256.hexdigest())


def _publish(staged: Path, target: Path) -> None:
    """Move a complete folder to its name. Another writer may be first: its content is the same."""
    for parent, _, _ in os.walk(staged):
        _sync_folder(Path(parent))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
