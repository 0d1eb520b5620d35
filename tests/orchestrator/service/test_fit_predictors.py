"""A table of operations is made once, before the search, where the study wants one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.executors.inline import InlineExecutor
from jobs.materials import Materials
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table, amounts
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.prepare import table_models
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service import fit_predictors
from orchestrator.study.events import Cost
from orchestrator.study.latency_estimate import share

TIMED = "objectives.decode_ms={goal: min}"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models each call to make a table may time."""
    calls: list[int] = []

    def make(materials: Materials, layouts: Sequence[Layout], cache: Path, most: int) -> Table:
        calls.append(most)
        return Table(
            {"decode_ms": dict.fromkeys({kind for one in layouts for kind in amounts(one)}, 1.0)}, {}
        )

    monkeypatch.setattr(fit_predictors, "make_table", make)
    return calls


def test_a_table_is_made_once_and_noted(
    prepared: Callable[..., PreparedStudy], made: list[int], tmp_path: Path
) -> None:
    ready, ledger = prepared(TIMED, "search.table=7"), Ledger(tmp_path / "ledger.db")
    first = fit_predictors.fit_predictors(ready, ledger, InlineExecutor())
    second = fit_predictors.fit_predictors(ready, ledger, InlineExecutor())
    assert made == [7]
    assert first.plan.original_cost.predicted["decode_ms"] > 0
    assert second.plan == first.plan


def test_a_study_that_times_nothing_or_tries_little_makes_no_table(
    prepared: Callable[..., PreparedStudy], made: list[int], tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for ready in (prepared("search.table=7"), prepared(TIMED)):
        assert fit_predictors.fit_predictors(ready, ledger, InlineExecutor()) is ready
    assert made == []
    assert table_models(prepared("search.candidates=64").config) == 32
    assert table_models(prepared("search.candidates=63").config) == 0


def test_a_table_that_cannot_be_made_ends_the_study_with_the_cure(
    prepared: Callable[..., PreparedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Table:
        raise RuntimeError("the timing process failed")

    monkeypatch.setattr(fit_predictors, "make_table", fail)
    with pytest.raises(RuntimeError, match=r"the timing process failed.*search\.table=0 does without one"):
        fit_predictors.fit_predictors(
            prepared(TIMED, "search.table=7"), Ledger(tmp_path / "l.db"), InlineExecutor()
        )


def test_the_models_to_choose_from_are_distinct_and_of_the_space(
    prepared: Callable[..., PreparedStudy],
) -> None:
    ready = prepared()
    layouts = fit_predictors.sampled(ready, 30, seed=0)
    # Of 3 × 3 × 7 combinations.
    assert len(layouts) == 30
    assert len({layout.size_bytes() for layout in layouts}) > 20
    assert fit_predictors.sampled(ready, 30, seed=0) == layouts


def test_what_is_not_predicted_follows_what_is() -> None:
    original, half = Cost(100, 1000, 10, {"decode_ms": 20.0}), Cost(40, 500, 10, {"decode_ms": 16.0})
    assert share("decode_ms", half, original) == 0.8
    assert share("decode_p90_ms", half, original) == 0.8
    assert share("token_joules", half, original) == 0.8
    assert share("memory_gib", half, original) == 0.4
    assert share("prefill_ms", half, original) == 0.5
