"""ArtifactStore: where bytes live. Folders by their content, records by key, created only if absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.storage.manifest import ArtifactRef


@dataclass(frozen=True)
class StoredArtifact:
    """One artifact that a store holds. used_at: when it was last put or fetched, in seconds since 1970."""

    ref: ArtifactRef
    used_at: float


@dataclass(frozen=True)
class Holdings:
    """What a store holds in all. unfinished_bytes: of writes that go on, or were killed."""

    artifacts: tuple[StoredArtifact, ...]
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
