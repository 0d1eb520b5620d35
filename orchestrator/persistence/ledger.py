"""Ledger: the durable record of a study's events, in SQLite beside the service. Replaying it rebuilds the Study."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.job import outcome_from_dict, outcome_to_dict
from jobs.recipe import Recipe
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    BudgetAllowance,
    CandidateProposed,
    CandidateStopped,
    Cost,
    Event,
    SearchExhausted,
    ServiceStarted,
    SlotsChanged,
)

_SCHEMA = """
create table if not exists about (key text primary key, value text not null);
create table if not exists events (
    number integer primary key,
    at real not null,
    kind text not null,
    body text not null
);
"""


class Ledger:
    """The events of a study in their order. An event survives a kill as soon as `append` has returned.

    One process writes the ledger, any number may read it. If it is lost, the results in the store remain, and a study
    that needs the same jobs finds their results there instead of running them.
    """

    def __init__(self, file: Path, read_only: bool = False) -> None:
        if read_only:
            self._db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, isolation_level=None)
            self._db.execute("pragma journal_mode=wal")
            # A kill loses nothing in this mode; only a power cut can, and then the store still has the results.
            self._db.execute("pragma synchronous=normal")
            self._db.executescript(_SCHEMA)

    def note(self, key: str, value: str) -> None:
        """Set a value that describes the whole study, such as its digest."""
        self._db.execute("insert or replace into about values (?, ?)", (key, value))

    def noted(self, key: str) -> str | None:
        row = self._db.execute("select value from about where key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Append several events as one transaction: after a kill all of them are in the ledger, or none."""
        self._db.execute("begin")
        try:
            yield
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")

    def append(self, event: Event) -> None:
        """Record an event; it is durable when this returns, or when `together` ends."""
        self._db.execute(
            "insert into events (at, kind, body) values (?, ?, ?)",
            (time.time(), type(event).__name__, json.dumps(_to_dict(event), allow_nan=False)),
        )

    def events(self) -> Iterator[tuple[float, Event]]:
        """Every event with its time (seconds since 1970), oldest first."""
        for at, kind, body in self._db.execute("select at, kind, body from events order by number"):
            yield at, _from_dict(kind, json.loads(body))

    def close(self) -> None:
        self._db.close()


def _to_dict(event: Event) -> dict[str, Any]:
    if isinstance(event, CandidateProposed):
        cost = None if event.cost is None else dataclasses.asdict(event.cost)
        return {
            "recipe": event.recipe.to_dict(),
            "choices": dict(event.choices),
            "cost": cost,
            "refused": event.refused,
        }
    if isinstance(event, AttemptEnded):
        return {"job_id": event.job_id, "attempt": event.attempt, "outcome": outcome_to_dict(event.outcome)}
    return dataclasses.asdict(event)


_OLD_KINDS = {
    "Proposed": "CandidateProposed",
    "Ended": "AttemptEnded",
    "Began": "ServiceStarted",
    "Granted": "BudgetAllowance",
    "Resized": "SlotsChanged",
    "Started": "AttemptStarted",
    "Exhausted": "SearchExhausted",
    "Stopped": "CandidateStopped",
}
"""Names of events in ledgers that version 0.1.0 wrote."""

_OLD_WORK = {"finishing": "finish_pending", "nothing": "none"}
"""Values of `BudgetAllowance.work` in those ledgers."""

_FLAT_EVENTS = {
    event.__name__: event for event in (SlotsChanged, AttemptStarted, SearchExhausted, CandidateStopped)
}


def _from_dict(stored_kind: str, body: Mapping[str, Any]) -> Event:
    kind = _OLD_KINDS.get(stored_kind, stored_kind)
    if kind == "CandidateProposed":
        cost = None if body["cost"] is None else Cost(**body["cost"])
        return CandidateProposed(Recipe.from_dict(body["recipe"]), body["choices"], cost, body["refused"])
    if kind == "AttemptEnded":
        return AttemptEnded(body["job_id"], body["attempt"], outcome_from_dict(body["outcome"]))
    if kind == "ServiceStarted":  # the first ledgers did not record what the budget allowed
        return ServiceStarted(body.get("slots", 1), _allowance(body.get("granted", {})))
    if kind == "BudgetAllowance":
        return _allowance(body)
    return _FLAT_EVENTS[kind](**body)


def _allowance(body: Mapping[str, Any]) -> BudgetAllowance:
    work = body.get("work", "all")
    return BudgetAllowance(_OLD_WORK.get(work, work), body.get("reason"))
