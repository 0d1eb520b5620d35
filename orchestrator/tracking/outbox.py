"""Outbox: what the tracker was told, in order, in a file that outlives every process."""

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
    """subject: the candidate's id, or empty. A later entry of a kind and subject says all that an earlier did."""

    number: int
    kind: Kind
    subject: str
    content: Mapping[str, Any]


class Outbox:
    """One process appends, another reads; what a reader delivered it notes elsewhere (see `Delivered`).

    So neither waits for the other's writes: an append costs well under a millisecond.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        # Survives the death of the process; a power cut may cost the last entries, which the ledger still has.
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(SCHEMA)
        self._database.execute(
            "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT 1 FROM identity)", (uuid.uuid4().hex,)
        )

    @property
    def id(self) -> str:
        """Never another outbox's: by it the mirror knows its own runs again."""
        return str(self._database.execute("SELECT id FROM identity").fetchone()[0])

    def append(self, kind: Kind, content: Mapping[str, Any], subject: str = "") -> None:
        text = json.dumps(content, allow_nan=False)
        self._database.execute(
            "INSERT INTO entries (kind, subject, content) VALUES (?, ?, ?)",
            (kind, subject, zlib.compress(text.encode(), 1)),
        )

    def after(self, number: int) -> list[Entry]:
        """What was appended after that entry, oldest first; of several on one subject, the last alone."""
        return self._entries("number > ?", number)

    def _entries(self, condition: str, value: int | str) -> list[Entry]:
        # Beside max() SQLite takes the other columns from the row that has the maximum.
        rows = self._database.execute(
            f"SELECT max(number), kind, subject, content FROM entries WHERE {condition} "
            "GROUP BY kind, subject ORDER BY 1",
            (value,),
        ).fetchall()
        return [Entry(row[0], row[1], row[2], json.loads(zlib.decompress(row[3]))) for row in rows]

    def latest(self, kind: Kind) -> Entry:
        """The latest entry of that kind; LookupError where there is none."""
        found = self._entries("kind = ?", kind)
        if not found:
            raise LookupError(f"the outbox holds no {kind}: its tracker was never told of one")
        return found[-1]

    def last(self) -> tuple[int, Kind | None]:
        """The number and kind of the latest entry; 0 and None for an empty outbox."""
        row = self._database.execute(
            "SELECT number, kind FROM entries ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return row or (0, None)

    def close(self) -> None:
        self._database.close()


class Delivered:
    """How far an outbox was delivered to one MLflow, in a file beside it."""

    def __init__(self, outbox: Path, uri: str) -> None:
        self._file = outbox.with_suffix(".delivered")
        self._uri = uri

    @property
    def number(self) -> int:
        """Of the last entry that needs no delivery any more."""
        return int(self._read().get(self._uri, 0))

    def note(self, number: int) -> None:
        entries = {**self._read(), self._uri: number}
        draft = self._file.with_suffix(".delivered-draft")
        draft.write_text(json.dumps(entries))
        draft.replace(self._file)

    def _read(self) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        return found
