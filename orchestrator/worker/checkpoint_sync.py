"""Checkpoints: how those of a training reach the machine that goes on with it, where machines share no disk.

They lie in a folder of the worker. Where the store is elsewhere they are put into it too: the record
`checkpoints/RECIPE/STEPS` names an artifact, and that of the most steps counts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from cluster.storage.manifest import ArtifactRef, DamagedError, link_or_copy
from cluster.storage.store import ArtifactStore
from jobs.training.checkpoints import MARKER

SEND_SECONDS = 60.0
"""About so much training may be lost where a machine goes without notice, beyond what its last checkpoint lacks."""

_PREFIX = "checkpoints/"


def steps_in(folder: Path) -> int:
    """How many steps are done in the checkpoint that lies in a folder of checkpoints; 0 where there is none."""
    try:
        return len(json.loads((folder / MARKER).read_text())["losses"])
    except FileNotFoundError:
        return 0


def bring(recipe_id: str, store: ArtifactStore, folder: Path) -> None:
    """Lay out in `folder` the checkpoint that the store holds, if it is further than the one that lies there. One that
    is damaged, or that no training wrote, is removed."""
    for key in reversed(list(store.records(f"{_PREFIX}{recipe_id}/"))):
        record = store.record(key)
        if record is None or _steps(key) <= steps_in(folder):
            continue
        staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            store.fetch(ArtifactRef(**record), staged)
            _check(staged)
        except LookupError:  # another attempt has sent a later one, and removed this
            continue
        except (DamagedError, ValueError):
            shutil.rmtree(staged, ignore_errors=True)
            _remove(key, store)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        return


def send(recipe_id: str, store: ArtifactStore, folder: Path) -> None:
    """Put the checkpoint that lies in `folder` into the store, if it is further than what the store holds, and remove
    what it takes the place of."""
    keys = list(store.records(f"{_PREFIX}{recipe_id}/"))
    steps = steps_in(folder)
    if steps == 0 or any(_steps(key) >= steps for key in keys):
        return
    ref, key = store.put(folder), f"{_PREFIX}{recipe_id}/{steps:08}"
    if not store.commit(key, asdict(ref)) and store.record(key) != asdict(ref):
        store.remove(ref)  # another attempt was as far
    for key in list(store.records(f"{_PREFIX}{recipe_id}/"))[:-1]:
        _remove(key, store)


def drop(recipe_ids: Collection[str], store: ArtifactStore) -> None:
    """Remove the checkpoints of these recipes from the store."""
    for key in list(store.records(_PREFIX)):
        if _recipe_id(key) in recipe_ids:
            _remove(key, store)


def held(store: ArtifactStore) -> dict[str, str]:
    """The recipes, by their ids, of whose trainings the store holds checkpoints; and the digest of each."""
    records = ((key, store.record(key)) for key in store.records(_PREFIX))
    return {_recipe_id(key): record["digest"] for key, record in records if record is not None}


def _check(folder: Path) -> None:
    """ValueError for what is no checkpoint: others may write into a store too, and who reads this trains with it, and
    removes the folder that it names."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    try:
        marker = json.loads((folder / MARKER).read_text())
        counts, losses = marker["folder"], marker["losses"]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no checkpoint") from error
    inside = names - {MARKER}
    plain = isinstance(counts, str) and "/" not in counts and counts not in ("", ".", "..")
    safe = all(name.startswith(f"{counts}/") and name.endswith(".safetensors") for name in inside)
    if not (plain and safe and inside and isinstance(losses, list)):
        raise ValueError(f"{folder} holds what is no checkpoint")


def _remove(key: str, store: ArtifactStore) -> None:
    # Killed between the two, a record is left that names nothing, and goes next time.
    record = store.record(key)
    if record is not None:
        store.remove(ArtifactRef(**record))
    store.forget(key)


def _recipe_id(key: str) -> str:
    return key.split("/")[1]


def _steps(key: str) -> int:
    return int(key.rpartition("/")[2])


class Sending:
    """Sends the checkpoints of one attempt while it goes on, in a thread, so that training does not wait.

    Call it after each step, from the thread that trains: what lies in the folder is then whole. workdir: for links to
    what is being sent, on the same file system.
    """

    def __init__(self, recipe_id: str, store: ArtifactStore, folder: Path, workdir: Path) -> None:
        self._recipe_id, self._store, self._folder, self._workdir = recipe_id, store, folder, workdir
        self._sent = steps_in(folder)
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None

    def __call__(self) -> None:
        """Begin to send the last checkpoint, if it is time and there is a new one."""
        busy = self._thread is not None and self._thread.is_alive()
        if busy or time.monotonic() - self._began < SEND_SECONDS:
            return
        self._began = time.monotonic()
        steps = steps_in(self._folder)
        if steps > self._sent:
            self._sent = steps
            linked = _linked(self._folder, self._workdir / f"sent-{steps}")
            self._thread = threading.Thread(target=self._send, args=(linked,), daemon=True)
            self._thread.start()

    def last(self) -> None:
        """Send what lies there now, and return when it is there. What is still under way goes on beside it."""
        steps = steps_in(self._folder)
        if steps:
            self._send(_linked(self._folder, self._workdir / f"last-{steps}"))

    def end(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._thread.join()

    def _send(self, linked: Path) -> None:
        # What does not get through is sent with the next one.
        with contextlib.suppress(OSError):
            send(self._recipe_id, self._store, linked)
        shutil.rmtree(linked, ignore_errors=True)


def _linked(folder: Path, target: Path) -> Path:
    """The checkpoint that counts now, as links that stay when the training removes it."""
    marker = (folder / MARKER).read_text()
    for file in (folder / json.loads(marker)["folder"]).rglob("*"):
        if file.is_file():
            link_or_copy(file, target / file.relative_to(folder))
    (target / MARKER).write_text(marker)
    return target
