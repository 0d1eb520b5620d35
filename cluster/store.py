"""ArtifactStore: where bytes live. Folders by their content, records by key, created only if absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class ArtifactRef:
    """A folder in the store: the digest of its files' names and contents, and their total size."""

    digest: str
    size_bytes: int


class ArtifactStore(Protocol):
    """Any number of processes may use one store at once; each method is atomic against a kill."""

    def put(self, folder: Path) -> ArtifactRef:
        """Keep a copy of a folder of plain files (no links). Putting the same content twice keeps one."""

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Lay the artifact's files out in `folder`, which must not exist. The files must not be changed.
        LookupError if it isn't held, OSError if its content does not match its digest."""

    def has(self, ref: ArtifactRef) -> bool: ...

    def remove(self, ref: ArtifactRef) -> None:
        """Forget an artifact; nothing happens if it isn't held."""

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        """Create the JSON record `key` (like `results/0123abcd`) only if absent. True for the one that created it."""

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of this key, or None."""

    def records(self, prefix: str) -> Iterator[str]:
        """The keys that start with `prefix`, sorted."""
