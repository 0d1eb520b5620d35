"""Measure the cost of a study: count the nodes that are up, look up their prices, keep the bill in the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.cloud.prices import Price, price_of
from cluster.executors.executor import Executor, NodeType
from orchestrator.persistence.ledger import Ledger
from orchestrator.study.budget import Bill, Budget, Nodes, allowance, given_price
from orchestrator.study.events import BudgetAllowance

NOTED = "bill"
"""The key of the bill in the ledger."""
COUNT_SECONDS = 5.0
"""How often nodes are counted: at most this much of the usage is lost with a killed process."""


def noted_bill(ledger: Ledger) -> Bill:
    """The bill of a study as its ledger has it."""
    noted = ledger.noted(NOTED)
    return Bill() if noted is None else Bill.from_dict(json.loads(noted))


class CostMeter:
    """The bill of a study, which one process continues from the bill of earlier processes.

    Between two counts, as many nodes are assumed to be up as were counted last.
    """

    def __init__(
        self,
        ledger: Ledger,
        executor: Executor,
        budget: Budget,
        price_per_hour: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        ask: Callable[[NodeType], Price | None] = price_of,
    ) -> None:
        """price_per_hour: of every node; None to ask for the price of each kind of node when it is first counted."""
        self.budget = budget
        self._ledger = ledger
        self._executor = executor
        self._price_per_hour = price_per_hour
        self._clock = clock
        self._ask = ask
        self._priced: dict[NodeType, Nodes] = {}
        self.bill = noted_bill(ledger)
        if price_per_hour is not None:
            self.bill = self.bill.priced_at(price_per_hour)
        self._counted_at = clock()
        self.count()

    def turn(self) -> bool:
        """Count the nodes if the last count is too old. Returns whether it did."""
        due = self._clock() - self._counted_at >= COUNT_SECONDS
        if due:
            self.count()
        return due

    def count(self) -> None:
        """Count the nodes and update the bill."""
        counts = self._executor.nodes()
        self._note([replace(self._price(kind), up=count) for kind, count in counts.items()])

    def settle(self) -> None:
        """Update the bill with the nodes of the last count: the cluster may be gone already."""
        self._note(self.bill.nodes)

    def _note(self, up: Sequence[Nodes]) -> None:
        now = self._clock()
        self.bill = self.bill.after(now - self._counted_at, up)
        self._counted_at = now
        self._ledger.note(NOTED, json.dumps(self.bill.to_dict()))

    def granted(self, seconds_to_finish: float) -> BudgetAllowance:
        """The work that the budget allows now (`budget.allowance`)."""
        return allowance(self.budget, self.bill, seconds_to_finish)

    def _price(self, kind: NodeType) -> Nodes:
        """Nodes of this kind with their price, and a count of 0."""
        if kind not in self._priced:
            self._priced[kind] = self._look_up_price(kind)
        return self._priced[kind]

    def _look_up_price(self, kind: NodeType) -> Nodes:
        if self._price_per_hour is not None:
            return Nodes(str(kind), **given_price(self._price_per_hour))
        price = self._ask(kind)
        if price is None:
            return Nodes(str(kind))
        return Nodes(
            str(kind), per_hour=price.per_hour, currency=price.currency, source=price.source, date=price.date,
            at_most=price.at_most,
        )  # fmt: skip
