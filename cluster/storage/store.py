"""ArtifactStore: the interface to stored data: folders by their content, and records by key, created only if absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.storage.manifest import ArtifactRef


@dataclass(frozen=True)
class StoredArtifact:
    """One artifact in a store."""

    ref: ArtifactRef
    used_at: float
    """The time of its last `put` or `fetch`, in seconds since 1970."""


@dataclass(frozen=True)
class Holdings:
    """The content of a store."""

    artifacts: tuple[StoredArtifact, ...]
    records: int
    """The number of records."""
    records_bytes: int
    unfinished_bytes: int
    """The size of writes that are in progress, or were interrupted by a kill."""


class ArtifactStore(Protocol):
    """Any number of processes may use one store at once; each method is atomic against a kill.

    Opening a store has no effect: a method that reads finds an absent store empty, one that writes creates it.
    """

    def ensure(self) -> None:
        """Create the folders of a local store, or check that a bucket can be reached, before the first write.

        OSError if that is not possible.
        """

    def put(self, folder: Path) -> ArtifactRef:
        """Store a copy of a folder of plain files. The same content is stored once.

        ValueError if the folder contains links or other special files, or no file at all.
        """

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Create `folder`, which must not exist, with the artifact's files. The files must not be changed.

        LookupError if the store does not have the artifact, DamagedError if its content does not match its digest.
        """

    def has(self, ref: ArtifactRef) -> bool: ...

    def remove(self, ref: ArtifactRef) -> None:
        """Remove an artifact; an absent one is ignored."""

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        """Create the JSON record `key` (such as `results/0123abcd`) only if it is absent; return whether it was.

        ValueError for NaN, infinities and keys of another form.
        """

    def record(self, key: str) -> dict[str, Any] | None:
        """Return the record of this key, or None."""

    def records(self, prefix: str) -> Iterator[str]:
        """Return the keys that start with `prefix`, sorted."""

    def forget(self, key: str) -> None:
        """Remove the record `key`, which may then be created anew; an absent one is ignored.

        Only for records of data that can be made again: a result whose record was removed would be counted twice.
        """

    def holdings(self) -> Holdings:
        """Return the content of the store, as exactly as concurrent writes and removals allow."""

    def sweep(self, seconds: float) -> None:
        """Remove unfinished writes that were not touched for `seconds`."""
