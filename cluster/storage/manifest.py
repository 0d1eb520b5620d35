"""Manifest: the description of an artifact by its files and their digests, and the checks of names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_KEY = re.compile(r"[a-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")

CHUNK_BYTES = 2**20


class DamagedError(OSError):
    """The content of an artifact does not match its digest."""


@dataclass(frozen=True)
class ArtifactRef:
    """A folder in the store."""

    digest: str
    """The SHA-256 of its manifest, that is of its files' names and contents."""
    size_bytes: int
    """The total size of its files."""


@dataclass(frozen=True)
class Entry:
    """One file of an artifact."""

    name: str
    """The path relative to the folder, with `/`."""
    size_bytes: int
    sha256: str


def listing(entries: Iterable[Entry]) -> bytes:
    """Return the text of an artifact's manifest, whose SHA-256 is the artifact's digest."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    return json.dumps([[entry.name, entry.size_bytes, entry.sha256] for entry in ordered]).encode()


def manifest(entries: Iterable[Entry]) -> ArtifactRef:
    """Return the reference of an artifact of these files: the same for the same content, in every store."""
    files = list(entries)
    digest = hashlib.sha256(listing(files)).hexdigest()
    return ArtifactRef(digest, sum(entry.size_bytes for entry in files))


def check_digest(digest: str) -> str:
    """Return the digest. ValueError if it is not one: it could name any file."""
    if not DIGEST_PATTERN.fullmatch(digest):
        raise ValueError(f"{digest!r} is no artifact's digest; give 64 hexadecimal digits")
    return digest


def check_prefix(prefix: str) -> str:
    """Return the prefix. ValueError if it could leave the folder of records."""
    if prefix.startswith("/") or ".." in prefix.split("/"):
        raise ValueError(f"{prefix!r} is no prefix of a record's key; give one like results/")
    return prefix


def check_key(key: str) -> str:
    """Return the key. ValueError if it is no valid file or object name, or could leave its folder."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no record's key; give one like results/0123abcd")
    return key


def files_of(folder: Path) -> list[str]:
    """Return the relative names of an artifact's files. ValueError for special files, and if there is no file."""
    files = list(plain_files(folder))
    if not files:
        raise ValueError(f"{folder} has no files; an artifact needs at least one")
    return files


def plain_files(folder: Path) -> Iterator[str]:
    """Return the relative names of all files below, sorted in each folder. ValueError for links and special files."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from (f"{entry.name}/{name}" for name in plain_files(Path(entry.path)))
        elif stat.S_ISREG(mode):
            yield entry.name
        else:
            raise ValueError(f"{entry.path} is a link or no plain file; an artifact has only plain files")


def entry_of(folder: Path, name: str) -> Entry:
    """Read one file of a folder and return its description."""
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(name, file.tell(), sha256)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` with the content of `source`, as a hard link where the file system allows one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, one without links, or a user who may not link
        shutil.copy(source, target)
