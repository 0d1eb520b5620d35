"""The disk usage of a store, and the eviction of items that can be made again.

A job that needs an evicted item makes it again (`orchestrator/worker/work.py`). Results are never evicted.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.storage.local_store import LEFTOVER_SECONDS, LocalStore
from cluster.storage.open import is_remote, open_store
from cluster.storage.store import ArtifactStore, StoredArtifact
from jobs.calibration.cache import cached_statistics
from orchestrator.persistence.front_file import read_front
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.lock import is_running, only_one
from orchestrator.persistence.records import ArtifactRecords
from orchestrator.persistence.study_folder import CACHE, CHECKPOINTS, SCRATCH, StudyFolder
from orchestrator.study.events import CandidateProposed
from orchestrator.worker import checkpoint_sync

Kind = Literal[
    "scratch", "unfinished", "unnamed", "statistics", "graphs", "checkpoints", "intermediates", "candidates",
    "fronts", "originals", "models", "records", "files",
]  # fmt: skip

LABELS: dict[Kind, str] = {
    "originals": "originals",
    "fronts": "models on a front",
    "candidates": "other models that were measured",
    "intermediates": "intermediate models",
    "models": "models",
    "unnamed": "models without a record",
    "statistics": "statistics",
    "graphs": "graphs that exports share",
    "checkpoints": "checkpoints",
    "scratch": "scratch",
    "unfinished": "incomplete writes",
    "records": "records of results and models",
    "files": "ledgers, reports, MLflow",
}
"""Each kind in words, in the order of the table."""

EVICTION_PRIORITY: dict[Kind, int] = {
    "scratch": 0, "unfinished": 0, "unnamed": 0, "statistics": 1, "graphs": 1, "checkpoints": 2,
    "intermediates": 3, "candidates": 4,
}  # fmt: skip
"""The evictable kinds. The lowest number is evicted first; within one number, the least recently used item."""

_GRAPHS = "graphs"
_UNTOUCHED_SECONDS = 60.0
"""If no study runs, a write without progress for this time was killed."""
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Item:
    """One item of a store, or several of one kind together."""

    kind: Kind
    name: str
    size_bytes: int
    used_at: float = 0.0
    """Seconds since 1970."""
    number: int = 1
    remove: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """Removes the item; None if it is not evictable."""


@dataclass(frozen=True)
class StudyUsage:
    """A study whose folder is in the store."""

    folder: Path
    running: bool
    members: frozenset[str]
    """The ids of its front."""
    needs: frozenset[str] | None = frozenset()
    """The ids of all recipes that it may need while it runs; None if its ledger cannot be read."""

    @property
    def name(self) -> str:
        return self.folder.name

    def may_need(self, ids: Sequence[str]) -> bool:
        """Whether the running study may need the artifact or statistics of one of these recipes."""
        return self.running and (self.needs is None or not self.needs.isdisjoint(ids))


@dataclass(frozen=True)
class Inventory:
    """All items of a store, and its studies."""

    studies: list[StudyUsage]
    items: list[Item]

    @property
    def size_bytes(self) -> int:
        return _sum(self.items)

    def to_evict(self, limit_bytes: int) -> list[Item]:
        """Return the items to evict, in order, until at most `limit_bytes` remain; or all evictable items."""
        evictable = sorted(
            (item for item in self.items if item.remove is not None and item.size_bytes),
            key=lambda item: (EVICTION_PRIORITY[item.kind], item.used_at),
        )
        chosen: list[Item] = []
        remaining = self.size_bytes
        for item in evictable:
            if remaining <= limit_bytes:
                break
            chosen.append(item)
            remaining -= item.size_bytes
        return chosen


def remove(items: Sequence[Item]) -> list[Item]:
    """Remove these items and return the removed ones. Items of a study that has just started stay."""
    removed = []
    for item in items:
        if item.remove is None:
            raise ValueError(f"{item.name} ({item.kind}) is not evictable")
        try:
            item.remove()
        except BlockingIOError:
            continue
        removed.append(item)
    return removed


def summary(usage: Inventory, removed: Sequence[Item]) -> dict[str, Any]:
    """Return the sizes and numbers of items as plain data, by kind and by study.

    removed: the items that were removed, or that would be.
    """
    kinds = {}
    for kind in LABELS:
        items = [item for item in usage.items if item.kind == kind and item.size_bytes]
        if items:
            kinds[kind] = {
                "number": sum(item.number for item in items),
                "size_bytes": _sum(items),
                "removable_bytes": _sum(item for item in items if item.remove is not None),
                "removed_bytes": _sum(item for item in removed if item.kind == kind),
            }
    studies = [
        {"study": study.name, "running": study.running, "front": len(study.members)}
        for study in usage.studies
    ]
    return {"kinds": kinds, "studies": studies}


def _sum(items: Iterable[Item]) -> int:
    return sum(item.size_bytes for item in items)


def parse_size(size: str) -> int:
    """Return the bytes of a size such as 5GB, 500 MB, 1.5GiB or 1000. Raises ValueError for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{size!r} is not a size; give one like 5GB, 500MB or 1.5GiB")
    base = 1024 if match[3] else 1000
    unit_bytes: int = base ** _UNITS[match[2].lower()]
    return round(float(match[1]) * unit_bytes)


def inventory_at(address: str) -> Inventory:
    """Return the inventory of a local or remote store. Raises the errors of `inventory` and of the store.

    A remote store has sizes only: nothing in it is evictable, since this machine cannot know the needs of studies on
    other machines.
    """
    if not is_remote(address):
        return inventory(Path(address))
    store = open_store(address)
    holdings = store.holdings()
    training_digests = set(checkpoint_sync.stored_checkpoints(store).values())
    checkpoints: list[int] = []
    models: list[int] = []
    for artifact in holdings.artifacts:
        if artifact.ref.digest in training_digests:
            checkpoints.append(artifact.ref.size_bytes)
        else:
            models.append(artifact.ref.size_bytes)
    items = [
        Item("models", address, sum(models), number=len(models)),
        Item("checkpoints", address, sum(checkpoints), number=len(checkpoints)),
        Item("unfinished", address, holdings.unfinished_bytes),
        Item("records", address, holdings.records_bytes, number=holdings.records),
    ]
    return Inventory([], items)


def sweep(address: str) -> int:
    """Remove incomplete writes and checkpoints that were not used for a day; return their size in bytes."""
    if not is_remote(address):
        inventory(Path(address))  # raises LookupError if the folder is not a store
    store = open_store(address)
    trainings = checkpoint_sync.stored_checkpoints(store)
    before = store.holdings()
    store.sweep(LEFTOVER_SECONDS)
    since = time.time() - LEFTOVER_SECONDS
    recent = {artifact.ref.digest for artifact in before.artifacts if artifact.used_at >= since}
    old = {id: digest for id, digest in trainings.items() if digest not in recent}
    checkpoint_sync.drop(old.keys(), store)
    swept = before.unfinished_bytes - store.holdings().unfinished_bytes
    old_digests = set(old.values())
    sizes = [artifact.ref.size_bytes for artifact in before.artifacts if artifact.ref.digest in old_digests]
    return swept + sum(sizes)


def inventory(root: Path) -> Inventory:
    """Return the inventory of a local store. Raises LookupError if the folder is not a store."""
    if not all((root / name).is_dir() for name in LocalStore.FOLDERS):
        raise LookupError(f"{root} is not a store; give the folder of `store:` in a study file, such as runs")
    store = open_store(str(root))
    studies = [_study_usage(file.parent) for file in sorted(root.glob(f"*/{StudyFolder(root).ledger.name}"))]
    sweep: Callable[[], None] | None = partial(store.sweep, _UNTOUCHED_SECONDS)
    if any(study.running for study in studies):
        sweep = None
    holdings = store.holdings()
    items = [
        *_artifacts(store, holdings.artifacts, studies),
        Item("unfinished", "tmp", holdings.unfinished_bytes, remove=sweep),
        Item("records", "records", holdings.records_bytes, number=holdings.records),
        *_cached(root / CACHE, studies),
    ]
    by_folder = {study.folder: study for study in studies}
    for path in sorted(root.iterdir()):
        if path in by_folder:
            items += _of_study(by_folder[path])
        elif path.name not in (*LocalStore.FOLDERS, CACHE):
            items.append(Item("files", path.name, _size(path)))
    return Inventory(studies, items)


def _study_usage(folder: Path) -> StudyUsage:
    try:
        members = frozenset(member.id for member in read_front(StudyFolder(folder).front).members)
    except FileNotFoundError:
        members = frozenset()
    if not is_running(folder):
        return StudyUsage(folder, False, members)
    return StudyUsage(folder, True, members, _needs(folder))


def _needs(folder: Path) -> frozenset[str] | None:
    ledger = Ledger(StudyFolder(folder).ledger, read_only=True)
    try:
        proposed = [event.recipe for _, event in ledger.events() if isinstance(event, CandidateProposed)]
    except ValueError:  # another version of slimfront wrote it
        return None
    finally:
        ledger.close()
    return frozenset(step.id for recipe in proposed for step in recipe.lineage())


def _artifacts(
    store: ArtifactStore, artifacts: Sequence[StoredArtifact], studies: Sequence[StudyUsage]
) -> Iterator[Item]:
    names: dict[str, list[str]] = {}
    records = ArtifactRecords(store)
    for id in records.recipe_ids():
        ref = records.named(id)
        if ref is not None:
            names.setdefault(ref.digest, []).append(id)
    originals, measured = _measured(store)
    members = frozenset(id for study in studies for id in study.members)
    running = any(study.running for study in studies)
    for artifact in artifacts:
        digest = artifact.ref.digest
        ids = names.get(digest, [])
        kind: Kind = "intermediates"
        if digest in measured:
            kind = "candidates"
        if not ids:
            kind = "unnamed"
        if not members.isdisjoint(ids):
            kind = "fronts"
        if digest in originals:
            kind = "originals"
        needed = any(study.may_need(ids) for study in studies)
        if not ids:
            needed = running  # a running study may have just stored it, and names it next
        remove = None
        if kind in EVICTION_PRIORITY and not needed:
            remove = partial(_remove_artifact, store, artifact, tuple(ids))
        yield Item(kind, digest, artifact.ref.size_bytes, artifact.used_at, remove=remove)


def _measured(store: ArtifactStore) -> tuple[set[str], set[str]]:
    """Return the digests of the originals, and of all measured models."""
    originals, measured = set(), set()
    for result in ArtifactRecords(store).results():
        if not result.techniques:
            originals.add(result.artifact)
        if result.meters:
            measured.add(result.artifact)
    return originals, measured


def _remove_artifact(store: ArtifactStore, artifact: StoredArtifact, ids: Sequence[str]) -> None:
    # If the process is killed in between, an artifact without a record remains, which is evicted first next time.
    for id in ids:
        ArtifactRecords(store).forget(id)
    store.remove(artifact.ref)


def _cached(cache: Path, studies: Sequence[StudyUsage]) -> Iterator[Item]:
    running = any(study.running for study in studies)
    for entry in cached_statistics(cache):
        item = Item("statistics", entry.name, entry.size_bytes, entry.used_at, remove=entry.remove)
        yield _unless(any(study.may_need([entry.key]) for study in studies), item)
    graphs = cache / _GRAPHS
    for entry in cached_statistics(graphs):
        yield _unless(
            running, Item("graphs", entry.name, entry.size_bytes, entry.used_at, remove=entry.remove)
        )
    for path in graphs.glob("*/"):  # the scratch folder of an export that was killed, or that is running
        remove = partial(shutil.rmtree, path, ignore_errors=True)
        yield _unless(running, Item("scratch", f"{CACHE}/{_GRAPHS}/{path.name}", _size(path), remove=remove))


def _unless(needed: bool, item: Item) -> Item:
    """Return the item, not evictable if it is needed."""
    if needed:
        return dataclasses.replace(item, remove=None)
    return item


def _of_study(study: StudyUsage) -> Iterator[Item]:
    files_bytes = 0
    kinds: dict[str, Kind] = {SCRATCH: "scratch", CHECKPOINTS: "checkpoints"}
    for path in study.folder.iterdir():
        if path.name not in kinds:
            files_bytes += _size(path)
            continue
        remove = partial(_remove_of_study, study.folder, path)
        name = f"{study.name}/{path.name}"
        yield _unless(study.running, Item(kinds[path.name], name, _size(path), _used_at(path), remove=remove))
    yield Item("files", study.name, files_bytes)


def _remove_of_study(folder: Path, path: Path) -> None:
    """Remove a folder of a study. Raises BlockingIOError if the study has just been started."""
    with only_one(folder):
        shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    """Return the size of a file or a folder, without hard links, whose bytes are the store's."""
    return sum(state.st_size for state in _states(path) if state.st_nlink == 1)


def _used_at(path: Path) -> float:
    return max((state.st_mtime for state in _states(path)), default=0.0)


def _states(path: Path) -> Iterator[os.stat_result]:
    files = [path]
    if path.is_dir():
        files = [Path(parent) / name for parent, _, names in os.walk(path) for name in names]
    for file in files:
        try:
            yield file.lstat()
        except FileNotFoundError:  # a running study has just removed it
            continue
