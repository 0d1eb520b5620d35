"""ArtifactCache: copies of a remote store's artifacts on this machine, up to a size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.storage.local_store import LEFTOVER_SECONDS, LocalStore
from cluster.storage.manifest import ArtifactRef, Entry


class ArtifactCache:
    """Copies in a folder, for all processes of this machine. Its errors never stop the caller."""

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self._copies = LocalStore(folder)
        self._limit_bytes = limit_bytes
        self._is_swept = False

    def fetch(self, ref: ArtifactRef, folder: Path) -> bool:
        """Create `folder` from the copy; return False if there is no intact copy."""
        try:
            self._copies.fetch(ref, folder)
        except LookupError:
            return False
        except OSError:  # damaged; or a full disk, which the download will report
            self._copies.remove(ref)
            return False
        return True

    def add(
        self,
        ref: ArtifactRef,
        folder: Path,
        entries: Sequence[Entry],
        copy_file: Callable[[Path, Path], None],
    ) -> None:
        """Keep a copy of a folder, and remove the copies that were used longest ago if there are too many."""

        def write(target: Path) -> None:
            for entry in entries:
                copy_file(folder / entry.name, target / entry.name)

        with contextlib.suppress(OSError):
            self._sweep_once()
            self._copies.add(ref, write)
            self._remove_excess()

    def remove(self, ref: ArtifactRef) -> None:
        self._copies.remove(ref)

    def _sweep_once(self) -> None:
        """Remove unfinished copies of killed processes, at the first write of this object."""
        if not self._is_swept:
            self._is_swept = True
            self._copies.sweep(LEFTOVER_SECONDS)

    def _remove_excess(self) -> None:
        copies = sorted(self._copies.holdings().artifacts, key=lambda artifact: artifact.used_at)
        excess_bytes = sum(artifact.ref.size_bytes for artifact in copies) - self._limit_bytes
        for artifact in copies:
            if excess_bytes <= 0:
                break
            self._copies.remove(artifact.ref)
            excess_bytes -= artifact.ref.size_bytes
