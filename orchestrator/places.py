"""Places: where a study's own files lie: in the store's folder, or here in `runs` where the store is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.store import is_remote
from orchestrator.progress import write_json

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
