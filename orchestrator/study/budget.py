"""Budget: the hours and the money that a study has used and may use. Pure arithmetic without a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.study.events import BudgetAllowance

HOUR = 3600.0
"""Seconds."""


@dataclass(frozen=True)
class Budget:
    """The maximum that a study may use; None for no maximum."""

    money: float | None = None
    """In the currency of the prices."""
    hours: float | None = None
    """Wall-clock time while the study runs, summed over all its processes."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of one kind that a study used."""

    kind: str
    up: int = 0
    """Number of nodes that are up now."""
    seconds: float = 0.0
    """Time that nodes were up while the study ran, summed over the nodes."""
    per_hour: float | None = None
    """Price of one node; None if it is unknown."""
    currency: str = ""
    source: str = ""
    """Origin of the price."""
    date: str = ""
    """Day of the price."""
    at_most: bool = False
    """The price is an upper bound."""

    @property
    def hours(self) -> float:
        return self.seconds / HOUR


@dataclass(frozen=True)
class Bill:
    """The time and the nodes that a study has used.

    Money is hours times the newest known price of each kind of node, so it follows changes of prices.
    """

    seconds: float = 0.0
    """Wall-clock time of the study, without gaps between its processes."""
    nodes: tuple[Nodes, ...] = ()

    @property
    def node_hours(self) -> float:
        return sum(nodes.hours for nodes in self.nodes)

    @property
    def money(self) -> float | None:
        """The cost of all nodes with a known price; None if there are none."""
        costs = [nodes.hours * nodes.per_hour for nodes in self.nodes if nodes.per_hour is not None]
        return sum(costs) if costs else None

    @property
    def per_hour(self) -> float:
        """The price of an hour with the nodes that are up now, without those of unknown price."""
        return sum(nodes.up * nodes.per_hour for nodes in self.nodes if nodes.per_hour is not None)

    @property
    def totals(self) -> dict[str, float]:
        """`node_hours`, and `cost` if a price is known."""
        totals = {"node_hours": self.node_hours}
        if self.money is not None:
            totals["cost"] = self.money
        return totals

    @property
    def currency(self) -> str:
        return next((nodes.currency for nodes in self.nodes if nodes.currency), "")

    @property
    def unpriced(self) -> list[Nodes]:
        """The used nodes whose price is unknown."""
        return [nodes for nodes in self.nodes if nodes.per_hour is None and (nodes.seconds or nodes.up)]

    def after(self, seconds: float, now: Sequence[Nodes]) -> Bill:
        """Return the bill after more wall-clock time with the same nodes, at whose end the nodes `now` are up.

        The times of `now` are ignored.
        """
        used = {}
        for nodes in self.nodes:
            total = nodes.seconds + nodes.up * seconds
            used[nodes.kind] = dataclasses.replace(nodes, seconds=total, up=0)
        for nodes in now:
            earlier = used.get(nodes.kind, Nodes(nodes.kind))
            used[nodes.kind] = dataclasses.replace(nodes, seconds=earlier.seconds)
        return Bill(self.seconds + seconds, tuple(used.values()))

    def priced_at(self, per_hour: float) -> Bill:
        """Return the bill with the same price for all nodes, the one in the study's file."""
        priced = tuple(dataclasses.replace(nodes, **given_price(per_hour)) for nodes in self.nodes)
        return dataclasses.replace(self, nodes=priced)

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "nodes": [asdict(nodes) for nodes in self.nodes]}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Bill:
        return Bill(content["seconds"], tuple(Nodes(**fields) for fields in content["nodes"]))


def given_price(per_hour: float) -> dict[str, Any]:
    """Return the fields of `Nodes` for a price in the study's file, whose currency is unknown."""
    return {
        "per_hour": per_hour, "currency": "", "source": "cluster.price_per_hour", "date": "", "at_most": False,
    }  # fmt: skip


@dataclass(frozen=True)
class _Limit:
    """One part of the budget, in its own unit."""

    name: str
    used: float
    to_finish: float
    """Expected use of the work that existing candidates still need."""
    maximum: float


def allowance(budget: Budget, bill: Bill, seconds_to_finish: float) -> BudgetAllowance:
    """Return the work that a budget allows after this bill.

    seconds_to_finish: the expected time for the work that existing candidates still need, with the nodes that are up.
    No candidates are proposed once the budget would not cover this work, since a front without timings is of no use.
    All work ends with the budget. With a budget of money and nodes of unknown price, no candidates are proposed.
    """
    limits = []
    if budget.hours is not None:
        name = f"the budget of {hours_text(budget.hours)}"
        limits.append(_Limit(name, bill.seconds / HOUR, seconds_to_finish / HOUR, budget.hours))
    if budget.money is not None:
        name = f"the budget of {money_text(budget.money, bill.currency)}"
        to_finish = bill.per_hour * seconds_to_finish / HOUR
        limits.append(_Limit(name, bill.money or 0.0, to_finish, budget.money))
    for limit in limits:
        if limit.used >= limit.maximum:
            return BudgetAllowance("none", f"{limit.name} is spent")
    if budget.money is not None and bill.unpriced:
        kinds = ", ".join(sorted(nodes.kind for nodes in bill.unpriced))
        name = f"the budget of {money_text(budget.money, '')}"
        reason = f"the price of {kinds} is unknown; set cluster.price_per_hour"
        return BudgetAllowance("finish_pending", f"{name} can't be kept: {reason}")
    for limit in limits:
        if limit.used + limit.to_finish >= limit.maximum:
            reserve = f"about {duration(seconds_to_finish)} kept back for the last measurements"
            return BudgetAllowance("finish_pending", f"{limit.name} is spent, but for {reserve}")
    return BudgetAllowance()


def lines(bill: Bill, budget: Budget) -> list[str]:
    """Return the bill as text: the total, then each kind of node with its price and the origin of the price."""
    time = f"{duration(bill.seconds)} by the clock"
    if budget.hours is not None:
        time += f" of {hours_text(budget.hours)}"
    total = f"{time}, {bill.node_hours:.2f} node-hours, {money_of(bill, budget)}"
    return [total, *(_line(nodes) for nodes in bill.nodes if nodes.seconds or nodes.up)]


def summary(bill: Bill, budget: Budget) -> str:
    """Return the total in a few words; empty without a price and a budget."""
    if bill.money is None and budget == Budget():
        return ""
    total = f"{bill.node_hours:.2f} node-hours, {money_of(bill, budget)}"
    if budget.hours is None:
        return total
    return f"{duration(bill.seconds)} of {hours_text(budget.hours)}, {total}"


def money_of(bill: Bill, budget: Budget) -> str:
    """Return the used money as text, with the budget and the uncertainty."""
    if bill.money is None:
        return "at an unknown price"
    text = money_text(bill.money, bill.currency)
    if any(nodes.at_most and nodes.seconds for nodes in bill.nodes):
        text = f"at most {text}"
    if budget.money is not None:
        text += f" of {money_text(budget.money, bill.currency)}"
    unpriced_hours = sum(nodes.hours for nodes in bill.unpriced)
    if unpriced_hours:
        text += f" without {unpriced_hours:.2f} node-hours of unknown price"
    return text


def describe_forecast(
    node_hours: float | None, unknown: str, price: Nodes | None, budget: Budget
) -> list[str]:
    """Return the expected use of a study as text, before it runs.

    node_hours: on one machine, so that they equal wall-clock hours; None if they are unknown, for the reason `unknown`.
    price: that of such a node; None if it is unknown.
    """
    sentences = []
    per_hour, currency = None, ""
    if price is not None:
        per_hour, currency = price.per_hour, price.currency
    if node_hours is not None:
        forecast = f"About {node_hours:.2f} node-hours"
        if per_hour is not None:
            forecast += f", {money_text(node_hours * per_hour, currency)}"
        sentences.append(f"{forecast}.")
    elif per_hour is not None or budget != Budget():
        sentences.append(f"The cost is unknown: {unknown}.")
    if price is not None and per_hour is not None:
        sentences.append(f"A node-hour costs {money_text(per_hour, currency)} ({_source(price)}).")
        if budget.money is not None:
            allowed = f"{budget.money / per_hour:.2f} node-hours"
            sentences.append(f"The budget of {money_text(budget.money, currency)} allows {allowed}.")
    if budget.hours is not None and node_hours is not None and node_hours > budget.hours:
        name = f"The budget of {hours_text(budget.hours)}"
        sentences.append(f"{name} ends it before: fewer candidates will be tried.")
    return sentences


def money_text(amount: float, currency: str) -> str:
    """Return an amount in cents, or with two more digits if it is below 10 cents."""
    digits = 2 if amount >= 0.1 or amount == 0 else 4
    return f"{amount:.{digits}f} {currency}".rstrip()


def hours_text(hours: float) -> str:
    return "1 hour" if hours == 1 else f"{hours:g} hours"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * HOUR:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / HOUR:.1f} hours"


def _line(nodes: Nodes) -> str:
    used = f"{nodes.kind}: {nodes.hours:.2f} node-hours"
    if nodes.per_hour is None:
        return f"{used}, price not known"
    price = f"{money_text(nodes.per_hour, nodes.currency)} each"
    if nodes.at_most:
        price = f"at most {price}"
    return f"{used}, {price} ({_source(nodes)})"


def _source(nodes: Nodes) -> str:
    return f"{nodes.source}, {nodes.date}" if nodes.date else nodes.source
