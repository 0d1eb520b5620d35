"""Budget: what a study has used and may use, in hours and money. Pure arithmetic; who counts is accounts.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.study.events import BudgetAllowance

HOUR = 3600.0


@dataclass(frozen=True)
class Budget:
    """The most that a study may use; None: as much as it takes. money: in the currency of the prices; hours: by the
    clock while it runs, all its processes together."""

    money: float | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Nodes:
    """The nodes of one kind. up: how many are now; seconds: how long they were up while the study ran, added up.

    per_hour: what one of them costs, None where it is not known; at_most: it may be less. source, date: who says so,
    of which day.
    """

    kind: str
    up: int = 0
    seconds: float = 0.0
    per_hour: float | None = None
    currency: str = ""
    source: str = ""
    date: str = ""
    at_most: bool = False

    @property
    def hours(self) -> float:
        return self.seconds / HOUR


@dataclass(frozen=True)
class Bill:
    """What a study has used until now. seconds: that it ran by the clock; gaps between its processes are none of them.

    Money is hours times the price that is known of each kind of node now: it follows a price that changes.
    """

    seconds: float = 0.0
    nodes: tuple[Nodes, ...] = ()

    @property
    def node_hours(self) -> float:
        return sum(one.hours for one in self.nodes)

    @property
    def money(self) -> float | None:
        """Of all nodes whose price is known; None where there are none."""
        known = [one.hours * one.per_hour for one in self.nodes if one.per_hour is not None]
        return sum(known) if known else None

    @property
    def per_hour(self) -> float:
        """What an hour costs with the nodes that are up now."""
        return sum(one.up * one.per_hour for one in self.nodes if one.per_hour is not None)

    @property
    def totals(self) -> dict[str, float]:
        """node_hours, and cost where it is known."""
        return {"node_hours": self.node_hours, **({} if self.money is None else {"cost": self.money})}

    @property
    def currency(self) -> str:
        return next((one.currency for one in self.nodes if one.currency), "")

    @property
    def unpriced(self) -> list[Nodes]:
        """Nodes that were used and whose price is not known."""
        return [one for one in self.nodes if one.per_hour is None and (one.seconds or one.up)]

    def after(self, seconds: float, now: Sequence[Nodes]) -> Bill:
        """The bill when the nodes that were up have been so for some seconds more, and `now` are. Of these, kind, count
        and price are read."""
        used = {
            one.kind: dataclasses.replace(one, seconds=one.seconds + one.up * seconds, up=0)
            for one in self.nodes
        }
        for one in now:
            before = used.get(one.kind, Nodes(one.kind))
            used[one.kind] = dataclasses.replace(one, seconds=before.seconds)
        return Bill(self.seconds + seconds, tuple(used.values()))

    def priced_at(self, per_hour: float) -> Bill:
        """The same with all nodes at one price, which the study's file gives."""
        return dataclasses.replace(
            self, nodes=tuple(dataclasses.replace(one, **given_price(per_hour)) for one in self.nodes)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "nodes": [asdict(one) for one in self.nodes]}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Bill:
        return Bill(content["seconds"], tuple(Nodes(**one) for one in content["nodes"]))


def given_price(per_hour: float) -> dict[str, Any]:
    """The fields of `Nodes` that tell a price which the study's file gives, in whatever currency."""
    return {
        "per_hour": per_hour, "currency": "", "source": "cluster.price_per_hour", "date": "", "at_most": False,
    }  # fmt: skip


def allowance(budget: Budget, bill: Bill, seconds_to_finish: float) -> BudgetAllowance:
    """What a budget allows after this bill, where finishing what was begun takes so long with the nodes that are up.

    Candidates end early enough that what may be on the front is still read to its end and timed: a front that lacks its
    timings is of no use. Where that was more than was thought, all work ends with the budget. Money cannot be kept to
    where a price is not known: then candidates end at once.
    """
    limits = []
    if budget.hours is not None:
        what = f"the budget of {hours_text(budget.hours)}"
        limits.append((what, bill.seconds / HOUR, seconds_to_finish / HOUR, budget.hours))
    if budget.money is not None:
        what = f"the budget of {money_text(budget.money, bill.currency)}"
        limits.append((what, bill.money or 0.0, bill.per_hour * seconds_to_finish / HOUR, budget.money))
    for what, used, _, most in limits:
        if used >= most:
            return BudgetAllowance("none", f"{what} is spent")
    if budget.money is not None and bill.unpriced:
        kinds = ", ".join(sorted(one.kind for one in bill.unpriced))
        why = f"what an hour of {kinds} costs is not known; give cluster.price_per_hour"
        return BudgetAllowance(
            "finish_pending", f"the budget of {money_text(budget.money, '')} can't be kept to: {why}"
        )
    for what, used, kept, most in limits:
        if used + kept >= most:
            left = f"about {duration(seconds_to_finish)} kept back for the last measurements"
            return BudgetAllowance("finish_pending", f"{what} is spent, but for {left}")
    return BudgetAllowance()


def lines(bill: Bill, budget: Budget) -> list[str]:
    """The bill in words: the sum, then each kind of node with its price, who says so and of which day."""
    ran = f"{duration(bill.seconds)} by the clock"
    if budget.hours is not None:
        ran += f" of {hours_text(budget.hours)}"
    found = [f"{ran}, {bill.node_hours:.2f} node-hours, {money_of(bill, budget)}"]
    return found + [_line(one) for one in bill.nodes if one.seconds or one.up]


def summary(bill: Bill, budget: Budget) -> str:
    """The sum in a few words; nothing where neither a price nor a budget gives anybody a reason to look."""
    if bill.money is None and budget == Budget():
        return ""
    ran = "" if budget.hours is None else f"{duration(bill.seconds)} of {hours_text(budget.hours)}, "
    return f"{ran}{bill.node_hours:.2f} node-hours, {money_of(bill, budget)}"


def money_of(bill: Bill, budget: Budget) -> str:
    """What was spent, and of how much; and how sure that is."""
    if bill.money is None:
        return "at a price that is not known"
    at_most = any(one.at_most and one.seconds for one in bill.nodes)
    text = ("at most " if at_most else "") + money_text(bill.money, bill.currency)
    if budget.money is not None:
        text += f" of {money_text(budget.money, bill.currency)}"
    missing = sum(one.hours for one in bill.unpriced)
    return text + (f" without {missing:.2f} node-hours of unknown price" if missing else "")


def describe_forecast(
    node_hours: float | None, unknown: str, price: Nodes | None, budget: Budget
) -> list[str]:
    """What a study will use, in words, before it runs. node_hours: on one machine, so that they are hours by the clock;
    None where they are not known, for the reason `unknown`. price: of such a node, None where nobody tells."""
    found = []
    per_hour, currency = (None, "") if price is None else (price.per_hour, price.currency)
    if node_hours is not None:
        cost = "" if per_hour is None else f", {money_text(node_hours * per_hour, currency)}"
        found.append(f"About {node_hours:.2f} node-hours{cost}.")
    elif per_hour is not None or budget != Budget():
        found.append(f"What it will cost is not known: {unknown}.")
    if price is not None and per_hour is not None:
        said = f"{price.source}{f', {price.date}' if price.date else ''}"
        found.append(f"A node-hour costs {money_text(per_hour, currency)} ({said}).")
        if budget.money is not None:
            allowed = budget.money / per_hour
            found.append(
                f"The budget of {money_text(budget.money, currency)} allows {allowed:.2f} node-hours."
            )
    if budget.hours is not None and node_hours is not None and node_hours > budget.hours:
        found.append(
            f"The budget of {hours_text(budget.hours)} ends it before: fewer candidates will be tried."
        )
    return found


def money_text(amount: float, currency: str) -> str:
    """In cents, but where that would be nothing."""
    digits = 2 if amount >= 0.1 or amount == 0 else 4
    return f"{amount:.{digits}f}{f' {currency}' if currency else ''}"


def hours_text(hours: float) -> str:
    return f"{hours:g} hour{'' if hours == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 1.5 * HOUR else f"{seconds / HOUR:.1f} hours"


def _line(one: Nodes) -> str:
    used = f"{one.kind}: {one.hours:.2f} node-hours"
    if one.per_hour is None:
        return f"{used}, price not known"
    price = f"{'at most ' if one.at_most else ''}{money_text(one.per_hour, one.currency)} each"
    return f"{used}, {price} ({one.source}{f', {one.date}' if one.date else ''})"
