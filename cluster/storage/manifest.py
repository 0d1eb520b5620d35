"""How an artifact is described: its files, their digests, and the checks on names."""

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
    """A folder in the store: the digest of its files' names and contents, and their total size."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Entry:
    """One file of an artifact: its name relative to the folder, with `/`, and the SHA-256 of its content."""

    name: str
    size_bytes: int
    sha256: str


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
    if not DIGEST_PATTERN.fullmatch(digest):
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


def files_of(folder: Path) -> list[str]:
    """The relative names of an artifact's files. ValueError for what is no plain file, and where there are none."""
    files = list(plain_files(folder))
    if not files:
        raise ValueError(f"{folder} holds no files; an artifact needs at least one")
    return files


def plain_files(folder: Path) -> Iterator[str]:
    """The relative names of all files below, sorted in each folder. ValueError for anything but files and folders."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from (f"{entry.name}/{name}" for name in plain_files(Path(entry.path)))
        elif stat.S_ISREG(mode):
            yield entry.name
        else:
            raise ValueError(f"{entry.path} is a link or no plain file; an artifact holds only plain files")


def entry_of(folder: Path, name: str) -> Entry:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(name, file.tell(), sha256)


def link_or_copy(source: Path, target: Path) -> None:
    """Let a file appear at `target`, which shares its bytes with the source where it can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links, or a user who may not link
        shutil.copy(source, target)
