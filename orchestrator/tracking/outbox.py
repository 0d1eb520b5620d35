"""The outbox: an ordered queue of tracking events in a file."""

from __future__ import annotations

import json
import sqlite3
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["start", "candidate", "finish"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, subject TEXT NOT NULL, content BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS identity (id TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """One event. A later entry of the same kind and subject replaces an earlier one."""

    number: int
    kind: Kind
    subject: str
    """The candidate's id, or empty."""
    content: Mapping[str, Any]


class Outbox:
    """A queue in SQLite: one process appends, another reads.

    The reader records its progress in another file (see `Delivered`), so neither waits for the other's writes: an
    append takes well under a millisecond.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        # Entries survive the death of the process. A power cut may lose the last ones, which the ledger still has.
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(SCHEMA)
        self._database.execute(
            "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT 1 FROM identity)", (uuid.uuid4().hex,)
        )

    @property
    def id(self) -> str:
        """The outbox's unique id, by which the mirror finds its runs in MLflow."""
        return str(self._database.execute("SELECT id FROM identity").fetchone()[0])

    def append(self, kind: Kind, content: Mapping[str, Any], subject: str = "") -> None:
        text = json.dumps(content, allow_nan=False)
        self._database.execute(
            "INSERT INTO entries (kind, subject, content) VALUES (?, ?, ?)",
            (kind, subject, zlib.compress(text.encode(), 1)),
        )

    def entries_after(self, number: int) -> list[Entry]:
        """Return the entries after this number, oldest first; only the last one of each kind and subject."""
        return self._entries("number > ?", number)

    def _entries(self, condition: str, value: int | str) -> list[Entry]:
        # Next to max(), SQLite takes the other columns from the row that has the maximum.
        rows = self._database.execute(
            f"SELECT max(number), kind, subject, content FROM entries WHERE {condition} "
            "GROUP BY kind, subject ORDER BY 1",
            (value,),
        ).fetchall()
        return [Entry(row[0], row[1], row[2], json.loads(zlib.decompress(row[3]))) for row in rows]

    def latest(self, kind: Kind) -> Entry:
        """Return the latest entry of this kind. Raises LookupError if there is none."""
        entries = self._entries("kind = ?", kind)
        if not entries:
            raise LookupError(f"the outbox has no entry of the kind {kind!r}: its study recorded none")
        return entries[-1]

    def last(self) -> tuple[int, Kind | None]:
        """Return the number and kind of the latest entry; 0 and None for an empty outbox."""
        row = self._database.execute(
            "SELECT number, kind FROM entries ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return row or (0, None)

    def close(self) -> None:
        self._database.close()


class Delivered:
    """The progress of delivery from an outbox to one MLflow server, in a file next to the outbox."""

    def __init__(self, outbox: Path, uri: str) -> None:
        self._file = outbox.with_suffix(".delivered")
        self._uri = uri

    @property
    def number(self) -> int:
        """The number of the last delivered entry, 0 if there is none."""
        return int(self._read().get(self._uri, 0))

    def note(self, number: int) -> None:
        """Record that all entries up to this number are delivered."""
        entries = {**self._read(), self._uri: number}
        draft = self._file.with_suffix(".delivered-draft")
        draft.write_text(json.dumps(entries))
        draft.replace(self._file)

    def _read(self) -> dict[str, int]:
        try:
            numbers: dict[str, int] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        return numbers
