"""Places: where a study's own files lie: in the store's folder, or here in `runs` where the store is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.storage.open import is_remote, open_store
from orchestrator.persistence.atomic_files import write_json

CACHE = "cache"
_STORE = "store.json"
"""In a study's folder: the address of its store, where that is not the folder above."""


def home(store: str) -> Path:
    """The local folder of all studies of the store at this address, and of what they share."""
    return Path("runs") if is_remote(store) else Path(store).expanduser()


def note_store(study: Path, store: str) -> None:
    """Note where the store of a study's folder is."""
    if is_remote(store):
        write_json(study / _STORE, {"store": store})
    else:
        (study / _STORE).unlink(missing_ok=True)


def store_of(study: Path) -> str:
    """The address of the store of a study's folder."""
    try:
        return str(json.loads((study / _STORE).read_text())["store"])
    except FileNotFoundError:
        return str(study.parent)


def publish(store: str, study: str, front: Mapping[str, Any], page: str) -> None:
    """Put a study's front and its report, an HTML page, into its store, if that is elsewhere, for other machines to
    see."""
    if is_remote(store):
        opened = open_store(store)
        for key, record in ((f"reports/{study}", {"html": page}), (f"fronts/{study}", front)):
            opened.forget(key)
            opened.commit(key, record)


def published(place: str) -> dict[str, Any]:
    """The front that was put into a store, of the study STORE/NAME. LookupError if there is none."""
    return _published(place, "fronts", "front")


def published_report(place: str) -> str:
    """The report that was put into a store, of the study STORE/NAME. LookupError if there is none."""
    return str(_published(place, "reports", "report")["html"])


def _published(place: str, prefix: str, what: str) -> dict[str, Any]:
    path, mark, options = place.partition("?")
    store, _, study = path.rpartition("/")
    found = open_store(store + mark + options).record(f"{prefix}/{study}")
    if found is None:
        raise LookupError(f"{store} holds no {what} of {study}: it is put there when a search ends")
    return found


MATERIALS = "materials.json"
"""In a study's folder: what its jobs read, and the target."""

RECIPE = "recipe.json"

MEASUREMENT = "measurement.json"


DOWNLOADS = "downloads"
"""Beside the cache: copies of artifacts, where the store is elsewhere."""

SCRATCH = "scratch"

CHECKPOINTS = "checkpoints"
"""In a study's folder: what jobs in progress write, and what trainings go on from."""
