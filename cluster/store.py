"""ArtifactStore: where bytes live. Folders by their content, records by key, created only if absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_KEY = re.compile(r"[a-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 2**20
_TRIALS = 5
"""A store that is reached for the first time is given some three seconds to do better."""
LEFTOVER_SECONDS = 24 * 3600.0
"""What a writer has not touched for so long, it left when it was killed."""


class Damaged(OSError):  # noqa: N818 - it is said of an artifact
    """The content of an artifact does not match its digest."""


@dataclass(frozen=True)
class ArtifactRef:
    """A folder in the store: the digest of its files' names and contents, and their total size."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Held:
    """One artifact that a store holds. used_at: when it was last put or fetched, in seconds since 1970."""

    ref: ArtifactRef
    used_at: float


@dataclass(frozen=True)
class Holdings:
    """What a store holds in all. unfinished_bytes: of writes that go on, or were killed."""

    artifacts: tuple[Held, ...]
    records: int
    records_bytes: int
    unfinished_bytes: int


class ArtifactStore(Protocol):
    """Any number of processes may use one store at once; each method is atomic against a kill."""

    def put(self, folder: Path) -> ArtifactRef:
        """Keep a copy of a folder of plain files (no links). Putting the same content twice keeps one.
        ValueError for links and other things that are no files, and where there is no file at all."""

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Lay the artifact's files out in `folder`, which must not exist. The files must not be changed.
        LookupError if it isn't held, Damaged if its content does not match its digest."""

    def has(self, ref: ArtifactRef) -> bool: ...

    def remove(self, ref: ArtifactRef) -> None:
        """Forget an artifact; nothing happens if it isn't held."""

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        """Create the JSON record `key` (like `results/0123abcd`) only if absent. True for the one that created it.
        ValueError for NaN, infinities and keys of another form."""

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of this key, or None."""

    def records(self, prefix: str) -> Iterator[str]:
        """The keys that start with `prefix`, sorted."""

    def forget(self, key: str) -> None:
        """Remove the record `key`, which may then be created anew; nothing happens if there is none. For records
        of what can be made again: what a record of a result counted, would count twice."""

    def holdings(self) -> Holdings:
        """All that is held, as far as it can be told while others write and remove."""

    def sweep(self, seconds: float) -> None:
        """Remove what writers left unfinished and have not touched for so long."""


@dataclass(frozen=True)
class Entry:
    """One file of an artifact: its name relative to the folder, with `/`, and the SHA-256 of its content."""

    name: str
    size_bytes: int
    sha256: str


def is_remote(address: str) -> bool:
    """Whether a store of this address lies elsewhere than in a folder."""
    return "://" in address


def open_store(address: str, downloads: Path | None = None) -> ArtifactStore:
    """The store at this address: a folder, or s3://BUCKET/PREFIX (cluster/s3.py tells its options).

    downloads: the folder in which a remote store keeps copies of artifacts, for all processes of this machine;
    without it each fetch is a download. ValueError for other addresses; a remote store is not asked yet.
    """
    if not is_remote(address):
        return LocalStore(Path(address).expanduser())
    scheme = address.partition("://")[0]
    if scheme != "s3":
        raise ValueError(f"there are no {scheme}:// stores; give a folder or s3://bucket/prefix")
    # boto3 takes a third of a second to import, which nobody pays who has a folder.
    from cluster.s3_store import S3Store

    return S3Store(address, downloads)


def place_of(address: str, digest: str) -> str:
    """Where the files of an artifact lie in the store at this address, for other tools to read: a folder, or s3://…"""
    check_digest(digest)
    if is_remote(address):
        return f"{address.partition('?')[0].rstrip('/')}/objects/{digest}/files"
    return str(Path(address) / "objects" / digest[:2] / digest)


def reach(address: str) -> None:
    """Do once in a remote store what a study does there. ValueError for an address that is none, OSError where the
    store can't be reached or something is not allowed."""
    if not address.startswith("s3://"):
        open_store(address)
        return
    from cluster.s3_store import S3Store

    S3Store(address, attempts=_TRIALS).check()


def listing(entries: Iterable[Entry]) -> bytes:
    """The text of an artifact's manifest, whose SHA-256 is the artifact's digest."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    return json.dumps([[entry.name, entry.size_bytes, entry.sha256] for entry in ordered]).encode()


def manifest(entries: Iterable[Entry]) -> ArtifactRef:
    """The reference of an artifact of these files: the same for the same content, in every store."""
    listed = list(entries)
    digest = hashlib.sha256(listing(listed)).hexdigest()
    return ArtifactRef(digest, sum(entry.size_bytes for entry in listed))


def check_digest(digest: str) -> str:
    """The digest itself. ValueError if it is none, and could name anything."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no artifact's digest; give 64 hexadecimal digits")
    return digest


def check_prefix(prefix: str) -> str:
    """The prefix itself. ValueError if it could leave the folder of records."""
    if prefix.startswith("/") or ".." in prefix.split("/"):
        raise ValueError(f"{prefix!r} is no prefix of a record's key; give one like results/")
    return prefix


def check_key(key: str) -> str:
    """The key itself. ValueError if it could be no file or object name, or leave its folder."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no record's key; give one like results/0123abcd")
    return key


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
            for name in _plain_files(held):
                link_or_copy(held / name, staged / name)
            found = manifest(_entry(staged, name) for name in _plain_files(staged))
            if found != ref:
                raise Damaged(
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
        objects = (folder for folder in (self.root / "objects").glob("*/*") if _DIGEST.fullmatch(folder.name))
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


def files_of(folder: Path) -> list[str]:
    """The relative names of an artifact's files. ValueError for what is no plain file, and where there are none."""
    files = list(_plain_files(folder))
    if not files:
        raise ValueError(f"{folder} holds no files; an artifact needs at least one")
    return files


def _plain_files(folder: Path) -> Iterator[str]:
    """The relative names of all files below, sorted in each folder. ValueError for anything but files and folders."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from (f"{entry.name}/{name}" for name in _plain_files(Path(entry.path)))
        elif stat.S_ISREG(mode):
            yield entry.name
        else:
            raise ValueError(f"{entry.path} is a link or no plain file; an artifact holds only plain files")


def _sizes(folder: Path) -> list[int]:
    """Of all files below; what vanishes meanwhile is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.lstat(os.path.join(parent, name)).st_size)
    return found


def _held(folder: Path) -> Held | None:
    """The artifact of this folder; None where it was removed meanwhile."""
    try:
        used_at = folder.stat().st_mtime
    except FileNotFoundError:
        return None
    return Held(ArtifactRef(folder.name, sum(_sizes(folder))), used_at)


def _touch(folder: Path) -> None:
    """Note that an artifact is used now, where that may be noted: not in another user's store."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _entry(folder: Path, name: str) -> Entry:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(name, file.tell(), sha256)


def _copy(source: Path, name: str, target: Path) -> Entry:
    """Copy one file, read-only and synced, and hash what was written in the same pass."""
    place = target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with (source / name).open("rb") as reader, place.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            sha256.update(chunk)
            writer.write(chunk)
        os.fchmod(writer.fileno(), 0o444)
        writer.flush()
        os.fsync(writer.fileno())
        return Entry(name, writer.tell(), sha256.hexdigest())


def link_or_copy(source: Path, target: Path) -> None:
    """Let a file appear at `target`, which shares its bytes with the source where it can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links, or a user who may not link
        shutil.copy(source, target)


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
