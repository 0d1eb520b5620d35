"""Send training checkpoints to the store, so that a training can resume on a machine without a shared disk.

A worker writes checkpoints into its own folder. If the store is remote, they are also stored as artifacts: the record
`checkpoints/RECIPE/STEPS` names the artifact, and the record with the most steps is the current one.
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
"""Seconds between two sent checkpoints. A machine that vanishes without notice loses about this much training, in
addition to the steps since its last local checkpoint."""

_PREFIX = "checkpoints/"


def steps_in(folder: Path) -> int:
    """Return the number of completed steps of the checkpoint in a folder of checkpoints; 0 if there is none."""
    try:
        return len(json.loads((folder / MARKER).read_text())["losses"])
    except FileNotFoundError:
        return 0


def fetch(recipe_id: str, store: ArtifactStore, folder: Path) -> None:
    """Fetch the stored checkpoint into `folder` if it has more steps than the checkpoint there.

    Stored checkpoints that are damaged, or that no training wrote, are removed.
    """
    for key in reversed(list(store.records(f"{_PREFIX}{recipe_id}/"))):
        record = store.record(key)
        if record is None or _steps(key) <= steps_in(folder):
            continue
        staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            store.fetch(ArtifactRef(**record), staged)
            _check(staged)
        except LookupError:  # another attempt has sent a later one and removed this one
            continue
        except (DamagedError, ValueError):
            shutil.rmtree(staged, ignore_errors=True)
            _remove(key, store)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        return


def send(recipe_id: str, store: ArtifactStore, folder: Path) -> None:
    """Store the checkpoint in `folder` if it has more steps than the stored ones, and remove those that it replaces."""
    keys = list(store.records(f"{_PREFIX}{recipe_id}/"))
    steps = steps_in(folder)
    if steps == 0 or any(_steps(key) >= steps for key in keys):
        return
    ref, key = store.put(folder), f"{_PREFIX}{recipe_id}/{steps:08}"
    if not store.commit(key, asdict(ref)) and store.record(key) != asdict(ref):
        store.remove(ref)  # another attempt has sent the same number of steps
    for key in list(store.records(f"{_PREFIX}{recipe_id}/"))[:-1]:
        _remove(key, store)


def drop(recipe_ids: Collection[str], store: ArtifactStore) -> None:
    """Remove the checkpoints of these recipes from the store."""
    for key in list(store.records(_PREFIX)):
        if _recipe_id(key) in recipe_ids:
            _remove(key, store)


def stored_checkpoints(store: ArtifactStore) -> dict[str, str]:
    """Return the digests of the stored checkpoints by the ids of their recipes."""
    digests = {}
    for key in store.records(_PREFIX):
        record = store.record(key)
        if record is not None:
            digests[_recipe_id(key)] = record["digest"]
    return digests


def _check(folder: Path) -> None:
    """Raise ValueError if a folder is not a checkpoint.

    Other programs may write into a store too, and a training reads the checkpoint and removes the folder that its
    marker names.
    """
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    try:
        marker = json.loads((folder / MARKER).read_text())
        current, losses = marker["folder"], marker["losses"]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a checkpoint") from error
    inside = names - {MARKER}
    is_plain = isinstance(current, str) and "/" not in current and current not in ("", ".", "..")
    are_safe = all(name.startswith(f"{current}/") and name.endswith(".safetensors") for name in inside)
    if not (is_plain and are_safe and inside and isinstance(losses, list)):
        raise ValueError(f"{folder} is not a checkpoint")


def _remove(key: str, store: ArtifactStore) -> None:
    # A process killed between the two leaves a record without an artifact, which is removed next time.
    record = store.record(key)
    if record is not None:
        store.remove(ArtifactRef(**record))
    store.forget(key)


def _recipe_id(key: str) -> str:
    return key.split("/")[1]


def _steps(key: str) -> int:
    return int(key.rpartition("/")[2])


class CheckpointSender:
    """Sends the checkpoints of one attempt from a thread, so that the training does not wait.

    Call it after each step from the training thread: the checkpoint in the folder is complete at that time.
    workdir: a folder of the same file system, for links to the files that are being sent.
    """

    def __init__(self, recipe_id: str, store: ArtifactStore, folder: Path, workdir: Path) -> None:
        self._recipe_id, self._store, self._folder, self._workdir = recipe_id, store, folder, workdir
        self._sent = steps_in(folder)
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None

    def __call__(self) -> None:
        """Start to send the latest checkpoint if it is new and the interval has passed."""
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

    def send_now(self) -> None:
        """Send the checkpoint in the folder and return when it is stored. A transfer in progress continues."""
        steps = steps_in(self._folder)
        if steps:
            self._send(_linked(self._folder, self._workdir / f"last-{steps}"))

    def wait(self) -> None:
        """Wait for the transfer in progress."""
        if self._thread is not None:
            self._thread.join()

    def _send(self, linked: Path) -> None:
        # A failed transfer is replaced by the next one.
        with contextlib.suppress(OSError):
            send(self._recipe_id, self._store, linked)
        shutil.rmtree(linked, ignore_errors=True)


def _linked(folder: Path, target: Path) -> Path:
    """Return the current checkpoint as hard links, which remain when the training removes it."""
    marker = (folder / MARKER).read_text()
    for file in (folder / json.loads(marker)["folder"]).rglob("*"):
        if file.is_file():
            link_or_copy(file, target / file.relative_to(folder))
    (target / MARKER).write_text(marker)
    return target
