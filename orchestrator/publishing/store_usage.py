"""Trim: what a store holds, and what of it goes first when it is to be smaller.

Only what can be made again goes: a job that comes to need it makes it again
(`orchestrator/worker/work.py`). Results stay.
"""

from __future__ import annotations

import json
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

CALLED: dict[Kind, str] = {
    "originals": "originals",
    "fronts": "models on a front",
    "candidates": "other models that were measured",
    "intermediates": "intermediate models",
    "models": "models",
    "unnamed": "models that no record names",
    "statistics": "statistics",
    "graphs": "graphs that exports share",
    "checkpoints": "checkpoints",
    "scratch": "scratch",
    "unfinished": "writes under way or killed",
    "records": "records of results and models",
    "files": "ledgers, reports, MLflow",
}
"""Each kind in words, in the order in which they are shown."""

WORTH: dict[Kind, int] = {
    "scratch": 0, "unfinished": 0, "unnamed": 0, "statistics": 1, "graphs": 1, "checkpoints": 2,
    "intermediates": 3, "candidates": 4,
}  # fmt: skip
"""What may go, and the least first; within one rank it is what was used longest ago."""

_GRAPHS = "graphs"
_UNTOUCHED_SECONDS = 60.0
"""A put that was not touched for so long while no study runs was killed."""
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Item:
    """One thing in a store, or a number of them together. used_at: seconds since 1970. remove: None where it has to
    stay."""

    kind: Kind
    name: str
    size_bytes: int
    used_at: float = 0.0
    number: int = 1
    remove: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class StudyUsage:
    """A study whose folder lies in the store. members: ids of its front; needs: ids of all recipes that it may come
    back to while it runs, None where its ledger does not tell."""

    folder: Path
    running: bool
    members: frozenset[str]
    needs: frozenset[str] | None = frozenset()

    @property
    def name(self) -> str:
        return self.folder.name

    def may_need(self, ids: Sequence[str]) -> bool:
        return self.running and (self.needs is None or not self.needs.isdisjoint(ids))


@dataclass(frozen=True)
class Inventory:
    tenants: list[StudyUsage]
    items: list[Item]

    @property
    def size_bytes(self) -> int:
        return _sum(self.items)

    def beyond(self, limit_bytes: int) -> list[Item]:
        """What has to go, in this order, until at most so much is left; all that may, where that is not enough."""
        order = sorted(
            (item for item in self.items if item.remove is not None and item.size_bytes),
            key=lambda item: (WORTH[item.kind], item.used_at),
        )
        found: list[Item] = []
        left = self.size_bytes
        for item in order:
            if left <= limit_bytes:
                break
            found.append(item)
            left -= item.size_bytes
        return found


def remove(items: Sequence[Item]) -> list[Item]:
    """Remove these; those that went. What a study that has just started took hold of stays."""
    gone = []
    for item in items:
        if item.remove is None:
            raise ValueError(f"{item.name} ({item.kind}) has to stay")
        try:
            item.remove()
        except BlockingIOError:
            continue
        gone.append(item)
    return gone


def summary(held: Inventory, gone: Sequence[Item]) -> dict[str, Any]:
    """The inventory as plain data, by kind and by study, and how much of each kind is `gone`."""
    kinds = {}
    for kind in CALLED:
        items = [item for item in held.items if item.kind == kind and item.size_bytes]
        if items:
            kinds[kind] = {
                "number": sum(item.number for item in items),
                "size_bytes": _sum(items),
                "removable_bytes": _sum(item for item in items if item.remove is not None),
                "removed_bytes": _sum(item for item in gone if item.kind == kind),
            }
    studies = [
        {
            "study": tenant.name,
            "running": tenant.running,
            "front": len(tenant.members),
        }
        for tenant in held.tenants
    ]
    return {"kinds": kinds, "studies": studies}


def _sum(items: Iterable[Item]) -> int:
    return sum(item.size_bytes for item in items)


def parse_size(size: str) -> int:
    """The bytes that a text such as 5GB, 500 MB, 1.5GiB or 1000 means. ValueError where it means none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{size!r} is no size; give one like 5GB, 500MB or 1.5GiB")
    unit: int = (1024 if found[3] else 1000) ** _UNITS[found[2].lower()]
    return round(float(found[1]) * unit)


def find_studies(place: str) -> Inventory:
    """All that lies in the store of this folder or address. Raises as `inventory` and stores do.

    Of a store that is elsewhere only how much there is; nothing may go, since nobody here knows what the studies of
    other machines need.
    """
    if not is_remote(place):
        return inventory(Path(place))
    store = open_store(place)
    held = store.holdings()
    trainings = set(checkpoint_sync.held(store).values())
    left = [one.ref.size_bytes for one in held.artifacts if one.ref.digest in trainings]
    models = [one.ref.size_bytes for one in held.artifacts if one.ref.digest not in trainings]
    items = [
        Item("models", place, sum(models), number=len(models)),
        Item("checkpoints", place, sum(left), number=len(left)),
        Item("unfinished", place, held.unfinished_bytes),
        Item("records", place, held.records_bytes, number=held.records),
    ]
    return Inventory([], items)


def sweep(place: str) -> int:
    """Remove what writers left unfinished and have not touched for a day, and checkpoints that nobody used for as long;
    how many bytes that was."""
    if not is_remote(place):
        inventory(Path(place))  # refuses what is no store
    store = open_store(place)
    trainings = checkpoint_sync.held(store)
    before = store.holdings()
    store.sweep(LEFTOVER_SECONDS)
    since = time.time() - LEFTOVER_SECONDS
    recent = {one.ref.digest for one in before.artifacts if one.used_at >= since}
    old = {id: digest for id, digest in trainings.items() if digest not in recent}
    checkpoint_sync.drop(old.keys(), store)
    swept = before.unfinished_bytes - store.holdings().unfinished_bytes
    return swept + sum(one.ref.size_bytes for one in before.artifacts if one.ref.digest in old.values())


def inventory(root: Path) -> Inventory:
    """All that lies in the store of this folder. LookupError where there is none."""
    if not all((root / name).is_dir() for name in LocalStore.FOLDERS):
        raise LookupError(
            f"{root} holds no store; give the folder that `store:` of a study names, such as runs"
        )
    store = open_store(str(root))
    tenants = [_tenant(file.parent) for file in sorted(root.glob(f"*/{StudyFolder(root).ledger.name}"))]
    running = any(tenant.running for tenant in tenants)
    sweep = partial(store.sweep, _UNTOUCHED_SECONDS)
    held = store.holdings()
    items = [
        *_artifacts(store, held.artifacts, tenants),
        Item("unfinished", "tmp", held.unfinished_bytes, remove=None if running else sweep),
        Item("records", "records", held.records_bytes, number=held.records),
        *_cached(root / CACHE, tenants),
    ]
    for place in sorted(root.iterdir()):
        tenant = next((one for one in tenants if one.folder == place), None)
        if tenant is not None:
            items += _of_study(tenant)
        elif place.name not in (*LocalStore.FOLDERS, CACHE):
            items.append(Item("files", place.name, _size(place)))
    return Inventory(tenants, items)


def _tenant(folder: Path) -> StudyUsage:
    front = _json(StudyFolder(folder).front)
    members = frozenset(member["id"] for member in front.get("members", []))
    running = is_running(folder)
    return StudyUsage(folder, running, members, _needs(folder) if running else frozenset())


def _needs(folder: Path) -> frozenset[str] | None:
    ledger = Ledger(StudyFolder(folder).ledger, read_only=True)
    try:
        proposed = [event.recipe for _, event in ledger.events() if isinstance(event, CandidateProposed)]
    except ValueError:  # another version of slimfront runs it
        return None
    finally:
        ledger.close()
    return frozenset(step.id for recipe in proposed for step in recipe.lineage())


def _artifacts(
    store: ArtifactStore, held: Sequence[StoredArtifact], tenants: Sequence[StudyUsage]
) -> Iterator[Item]:
    names: dict[str, list[str]] = {}
    records = ArtifactRecords(store)
    for id in records.recipe_ids():
        ref = records.named(id)
        names.setdefault("" if ref is None else ref.digest, []).append(id)
    originals, measured = _measured(store)
    members = frozenset(id for tenant in tenants for id in tenant.members)
    running = any(tenant.running for tenant in tenants)
    for one in held:
        digest = one.ref.digest
        ids = names.get(digest, [])
        kind: Kind = "candidates" if digest in measured else "intermediates"
        if not ids:
            kind = "unnamed"
        if not members.isdisjoint(ids):
            kind = "fronts"
        if digest in originals:
            kind = "originals"
        # What nobody names yet may have just been put.
        stays = kind not in WORTH or (running if not ids else any(one.may_need(ids) for one in tenants))
        gone = None if stays else partial(_remove_artifact, store, one, tuple(ids))
        yield Item(kind, digest, one.ref.size_bytes, one.used_at, remove=gone)


def _measured(store: ArtifactStore) -> tuple[set[str], set[str]]:
    """The digests of the originals, and of all that was measured."""
    originals, measured = set(), set()
    for result in ArtifactRecords(store).results():
        if not result.techniques:
            originals.add(result.artifact)
        if result.meters:
            measured.add(result.artifact)
    return originals, measured


def _remove_artifact(store: ArtifactStore, held: StoredArtifact, ids: Sequence[str]) -> None:
    # Killed between the two, an artifact that nobody names is left, which is what goes first next time.
    for id in ids:
        ArtifactRecords(store).forget(id)
    store.remove(held.ref)


def _cached(cache: Path, tenants: Sequence[StudyUsage]) -> Iterator[Item]:
    running = any(tenant.running for tenant in tenants)
    for one in cached_statistics(cache):
        stays = any(tenant.may_need([one.key]) for tenant in tenants)
        gone = None if stays else one.remove
        yield Item("statistics", one.name, one.size_bytes, one.used_at, remove=gone)
    graphs = cache / _GRAPHS
    for one in cached_statistics(graphs):
        gone = None if running else one.remove
        yield Item("graphs", one.name, one.size_bytes, one.used_at, remove=gone)
    for left in graphs.iterdir() if graphs.is_dir() else ():
        if left.is_dir():  # where one was written
            emptied = None if running else partial(shutil.rmtree, left, ignore_errors=True)
            yield Item("scratch", f"{CACHE}/{_GRAPHS}/{left.name}", _size(left), remove=emptied)


def _of_study(tenant: StudyUsage) -> Iterator[Item]:
    own = 0
    kinds: dict[str, Kind] = {SCRATCH: "scratch", CHECKPOINTS: "checkpoints"}
    for place in tenant.folder.iterdir():
        if place.name not in kinds:
            own += _size(place)
            continue
        gone = None if tenant.running else partial(_remove_of_study, tenant.folder, place)
        name = f"{tenant.name}/{place.name}"
        yield Item(kinds[place.name], name, _size(place), _used_at(place), remove=gone)
    yield Item("files", tenant.name, own)


def _remove_of_study(folder: Path, place: Path) -> None:
    """BlockingIOError where the study has just been started."""
    with only_one(folder):
        shutil.rmtree(place, ignore_errors=True)


def _size(place: Path) -> int:
    """Of a file, or of all files below a folder that are not those of the store too, by links."""
    found = 0
    for state in _states(place):
        found += state.st_size if state.st_nlink == 1 else 0
    return found


def _used_at(place: Path) -> float:
    return max((state.st_mtime for state in _states(place)), default=0.0)


def _states(place: Path) -> Iterator[os.stat_result]:
    if not place.is_dir():
        places = [place]
    else:
        places = [Path(parent) / name for parent, _, names in os.walk(place) for name in names]
    for file in places:
        try:
            yield file.lstat()
        except FileNotFoundError:  # a study that runs has removed it
            continue


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return found
