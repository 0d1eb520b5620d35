"""Lock: one process at a time works on a study's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "lock"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a study's folder against a second service. BlockingIOError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_running(folder: Path) -> bool:
    """Whether a process runs the study of this folder now."""
    if not (folder / FILE).exists():
        return False
    try:
        with only_one(folder):
            return False
    except BlockingIOError:
        return True
