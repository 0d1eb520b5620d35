"""The latency table is created once, before the search, if the study needs one."""

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
def table_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the maximum number of models of each call that creates a table."""
    calls: list[int] = []

    def make(materials: Materials, layouts: Sequence[Layout], cache: Path, max_models: int) -> Table:
        calls.append(max_models)
        kinds = {kind for layout in layouts for kind in amounts(layout)}
        return Table({"decode_ms": dict.fromkeys(kinds, 1.0)}, {})

    monkeypatch.setattr(fit_predictors, "make_table", make)
    return calls


def test_a_table_is_created_once_and_stored(
    prepared: Callable[..., PreparedStudy], table_calls: list[int], tmp_path: Path
) -> None:
    ready, ledger = prepared(TIMED, "search.table=7"), Ledger(tmp_path / "ledger.db")
    first = fit_predictors.fit_predictors(ready, ledger, InlineExecutor())
    second = fit_predictors.fit_predictors(ready, ledger, InlineExecutor())
    assert table_calls == [7]
    assert first.plan.original_cost.predicted["decode_ms"] > 0
    assert second.plan == first.plan


def test_a_study_without_timings_or_with_few_candidates_creates_no_table(
    prepared: Callable[..., PreparedStudy], table_calls: list[int], tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for ready in (prepared("search.table=7"), prepared(TIMED)):
        assert fit_predictors.fit_predictors(ready, ledger, InlineExecutor()) is ready
    assert table_calls == []
    assert table_models(prepared("search.candidates=64").config) == 32
    assert table_models(prepared("search.candidates=63").config) == 0


def test_a_failed_table_ends_the_study_with_a_remedy(
    prepared: Callable[..., PreparedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Table:
        raise RuntimeError("the timing process failed")

    monkeypatch.setattr(fit_predictors, "make_table", fail)
    with pytest.raises(RuntimeError, match=r"the timing process failed.*search\.table=0 does without one"):
        fit_predictors.fit_predictors(
            prepared(TIMED, "search.table=7"), Ledger(tmp_path / "l.db"), InlineExecutor()
        )


def test_sampled_models_are_distinct_members_of_the_space(
    prepared: Callable[..., PreparedStudy],
) -> None:
    ready = prepared()
    layouts = fit_predictors.sampled(ready, 30, seed=0)
    # The space has 3 × 3 × 7 combinations.
    assert len(layouts) == 30
    assert len({layout.size_bytes() for layout in layouts}) > 20
    assert fit_predictors.sampled(ready, 30, seed=0) == layouts


def test_metrics_without_a_prediction_follow_predicted_ones() -> None:
    original, half = Cost(100, 1000, 10, {"decode_ms": 20.0}), Cost(40, 500, 10, {"decode_ms": 16.0})
    assert share("decode_ms", half, original) == 0.8
    assert share("decode_p90_ms", half, original) == 0.8
    assert share("token_joules", half, original) == 0.8
    assert share("memory_gib", half, original) == 0.4
    assert share("prefill_ms", half, original) == 0.5
