"""The ledger stores events, reads them back and keeps transactions atomic."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from jobs import techniques
from jobs.job import Failure, Success
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from orchestrator.persistence.ledger import Ledger
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

RECIPE = Recipe(Origin("m", "d", 1)).then(techniques.load("rtn")(bits=3, group=64))
EVENTS: list[Event] = [
    ServiceStarted(),
    SlotsChanged(8),
    ServiceStarted(2, BudgetAllowance("none", "the budget of 2 hours is spent")),
    BudgetAllowance("finish_pending", "the budget of 2 hours is spent, but for 3 minutes"),
    CandidateProposed(RECIPE, {"bits": "rtn", "bits.rtn.bits": 3}, Cost(10, 20, 3)),
    CandidateProposed(RECIPE, {"bits": "skip"}, None, "it does not fit"),
    AttemptStarted("job", 1),
    AttemptEnded(
        "job", 1, Success("digest", 12, Measurement({"accuracy": 0.5}, {"accuracy": 0.1}, ("accuracy",)), 1.5)
    ),
    AttemptEnded("job", 2, Failure("diverged", "NaN", "trace")),
    SearchExhausted("nothing left"),
    CandidateStopped(RECIPE.id, "hopeless"),
]


def test_events_are_read_back_unchanged_and_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for event in EVENTS:
        ledger.append(event)
    ledger.close()
    reader = Ledger(tmp_path / "ledger.db", read_only=True)
    assert [event for _, event in reader.events()] == EVENTS
    assert all(recorded_at > 1e9 for recorded_at, _ in reader.events())


def test_a_service_start_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.append(ServiceStarted(3))
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("""update events set body = '{"slots": 3}'""")
    database.close()
    reader = Ledger(tmp_path / "ledger.db", read_only=True)
    assert [event for _, event in reader.events()] == [ServiceStarted(3, BudgetAllowance("all"))]


def test_a_transaction_stores_all_of_its_events_or_none(tmp_path: Path) -> None:
    ledger, reader = Ledger(tmp_path / "ledger.db"), Ledger(tmp_path / "ledger.db", read_only=True)
    with ledger.transaction():
        ledger.append(EVENTS[0])
        ledger.append(EVENTS[1])
        assert list(reader.events()) == []
    assert [event for _, event in reader.events()] == EVENTS[:2]

    def interrupted() -> None:
        with ledger.transaction():
            ledger.append(EVENTS[2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ledger.append(EVENTS[3])
    assert [event for _, event in reader.events()] == [*EVENTS[:2], EVENTS[3]]


def test_notes_are_replaced(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.noted("digest") is None
    ledger.note("digest", "1")
    ledger.note("digest", "2")
    assert ledger.noted("digest") == "2"


def test_a_value_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    with pytest.raises(ValueError, match="JSON"):
        ledger.append(CandidateProposed(RECIPE, {"ratio": float("nan")}, None))
