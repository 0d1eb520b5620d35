"""Node hours, their cost, and the allowance that follows from a budget."""

from __future__ import annotations

import dataclasses
import json

import pytest

from orchestrator.study.budget import HOUR, Bill, Budget, Nodes, allowance, describe_forecast, lines, summary

GPU = Nodes("g6.2xlarge", 2, per_hour=0.9, currency="USD", source="a table", date="2026-09-24")
HEAD = Nodes("m7i.large", 1, per_hour=0.1, currency="USD", source="a table", date="2026-09-24")
UNKNOWN = Nodes("gpu-workers", 1)


def bill(hours: float, *nodes: Nodes) -> Bill:
    """Return the bill of these nodes, which have been up for this many hours and still are."""
    return Bill().after(0.0, nodes).after(hours * HOUR, nodes)


def test_nodes_cost_their_hourly_price_times_their_uptime() -> None:
    total = bill(1.5, GPU, HEAD)
    assert total.node_hours == pytest.approx(4.5)
    assert total.money == pytest.approx(3.0 * 0.9 + 1.5 * 0.1)
    assert total.per_hour == pytest.approx(1.9)
    assert total.totals == {"node_hours": total.node_hours, "cost": total.money}


def test_a_removed_node_stays_on_the_bill_and_costs_nothing_more() -> None:
    total = bill(1.0, GPU, HEAD).after(0.0, [HEAD]).after(HOUR, [HEAD])
    assert total.node_hours == pytest.approx(2.0 + 2.0)
    assert total.per_hour == pytest.approx(0.1)


def test_an_interval_is_billed_by_the_nodes_at_its_start() -> None:
    grown = Bill().after(0.0, [HEAD]).after(HOUR, [HEAD, GPU])
    assert grown.node_hours == pytest.approx(1.0)


def test_a_bill_is_read_back_as_it_was_written() -> None:
    written = bill(1.0, GPU, UNKNOWN)
    assert Bill.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_a_new_price_applies_to_all_hours_of_its_node_type() -> None:
    repriced = bill(1.0, GPU).after(0.0, [dataclasses.replace(GPU, per_hour=0.5, date="2026-11-23")])
    assert repriced.money == pytest.approx(1.0)


def test_a_price_in_the_study_applies_to_all_nodes() -> None:
    repriced = bill(1.0, GPU, UNKNOWN).priced_at(2.0)
    assert repriced.money == pytest.approx(6.0)
    assert not repriced.unpriced
    assert repriced.currency == ""


def test_node_hours_without_a_price_are_excluded_from_the_sum_and_reported() -> None:
    partly_priced = bill(1.0, GPU, UNKNOWN)
    assert partly_priced.money == pytest.approx(1.8)
    assert "1.80 USD without 1.00 node-hours of unknown price" in lines(partly_priced, Budget())[0]
    assert bill(1.0, UNKNOWN).money is None
    assert "cost" not in bill(1.0, UNKNOWN).totals


def test_without_a_budget_everything_is_allowed() -> None:
    assert allowance(Budget(), bill(1000, GPU), 1e9).work == "all"


@pytest.mark.parametrize(
    ("hours", "to_finish", "work"),
    [
        (1.0, 0.0, "all"),
        (1.0, 0.9, "all"),
        (1.0, 1.0, "finish_pending"),
        (1.7, 0.5, "finish_pending"),
        (2.0, 0.0, "none"),
    ],
)
def test_hours_are_reserved_for_pending_work(hours: float, to_finish: float, work: str) -> None:
    granted = allowance(Budget(hours=2), bill(hours, GPU), to_finish * HOUR)
    assert granted.work == work
    if work != "all":
        assert granted.reason is not None
        assert granted.reason.startswith("the budget of 2 hours is spent")
    if work == "finish_pending":
        assert "kept back for the last measurements" in str(granted.reason)


@pytest.mark.parametrize(
    ("money", "to_finish", "work"),
    [
        (4.0, 0.0, "all"),
        (2.0, 0.0, "all"),
        (2.0, 0.05, "finish_pending"),
        (1.9, 0.0, "none"),
        (1.0, 0.0, "none"),
    ],
)
def test_money_is_reserved_at_the_price_of_the_running_nodes(
    money: float, to_finish: float, work: str
) -> None:
    spent = bill(1.0, GPU, HEAD)  # 1.9 an hour
    assert allowance(Budget(money=money), spent, 2 * to_finish * HOUR).work == work


def test_the_first_exhausted_limit_ends_the_budget() -> None:
    spent = bill(1.0, GPU, HEAD)
    assert allowance(Budget(money=1, hours=10), spent, 0).reason == "the budget of 1.00 USD is spent"
    assert allowance(Budget(money=10, hours=1), spent, 0).reason == "the budget of 1 hour is spent"


def test_a_money_budget_cannot_be_enforced_when_a_price_is_unknown() -> None:
    granted = allowance(Budget(money=100), bill(0.0, GPU, UNKNOWN), 0)
    assert granted.work == "finish_pending"
    assert "the price of gpu-workers is unknown; set cluster.price_per_hour" in str(granted.reason)
    assert allowance(Budget(hours=100), bill(0.0, UNKNOWN), 0).work == "all"
    assert allowance(Budget(money=1), bill(2.0, GPU, UNKNOWN), 0).work == "none"


def test_the_lines_of_a_bill_state_each_price_with_its_source_and_date() -> None:
    spot = dataclasses.replace(GPU, kind="g6.2xlarge (spot)", at_most=True)
    bill_lines = lines(bill(1.0, spot, HEAD), Budget(money=20, hours=2))
    assert bill_lines == [
        "60 minutes by the clock of 2 hours, 3.00 node-hours, at most 1.90 USD of 20.00 USD",
        "g6.2xlarge (spot): 2.00 node-hours, at most 0.90 USD each (a table, 2026-09-24)",
        "m7i.large: 1.00 node-hours, 0.10 USD each (a table, 2026-09-24)",
    ]


def test_the_summary_omits_money_without_a_price_and_a_budget() -> None:
    assert summary(bill(1.0, UNKNOWN), Budget()) == ""
    assert (
        summary(bill(1.0, UNKNOWN), Budget(hours=3))
        == "60 minutes of 3 hours, 1.00 node-hours, at an unknown price"
    )
    assert summary(bill(1.0, HEAD), Budget()) == "1.00 node-hours, 0.10 USD"


def test_without_earlier_jobs_the_forecast_states_only_what_the_budget_allows() -> None:
    price = dataclasses.replace(GPU, per_hour=2.0)
    assert describe_forecast(None, "nothing like it has run here", price, Budget(money=20)) == [
        "The cost is unknown: nothing like it has run here.",
        "A node-hour costs 2.00 USD (a table, 2026-09-24).",
        "The budget of 20.00 USD allows 10.00 node-hours.",
    ]
    assert describe_forecast(None, "nothing like it has run here", None, Budget()) == []


def test_a_forecast_from_earlier_jobs_states_hours_and_money() -> None:
    forecast = describe_forecast(1.5, "", dataclasses.replace(GPU, per_hour=2.0), Budget(hours=1))
    assert forecast[0] == "About 1.50 node-hours, 3.00 USD."
    assert forecast[-1] == "The budget of 1 hour ends it before: fewer candidates will be tried."
    assert describe_forecast(1.0, "", None, Budget(hours=1)) == ["About 1.00 node-hours."]
