"""Accounts: counts the nodes that are up while a study runs, asks what they cost, and keeps the bill in the ledger."""

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
"""The ledger's note."""
COUNT_SECONDS = 5.0
"""How often nodes are counted: so much, at most, of what was used is forgotten with a process that is killed."""


def noted_bill(ledger: Ledger) -> Bill:
    """What a study has used, as its ledger has it."""
    noted = ledger.noted(NOTED)
    return Bill() if noted is None else Bill.from_dict(json.loads(noted))


class CostMeter:
    """One process's part of a study's bill, on top of what processes before it used.

    Until nodes are counted again, as many are taken to be up as were counted last. price_per_hour: of every node,
    where the study's file gives one; else each kind's price is asked for when such a node is first seen.
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
        self.budget = budget
        self._ledger = ledger
        self._executor = executor
        self._price_per_hour = price_per_hour
        self._clock = clock
        self._ask = ask
        self._priced: dict[NodeType, Nodes] = {}
        before = noted_bill(ledger)
        self.bill = before if price_per_hour is None else before.priced_at(price_per_hour)
        self._counted_at = clock()
        self.count()

    def turn(self) -> bool:
        """Count the nodes if it is time to; whether it was."""
        due = self._clock() - self._counted_at >= COUNT_SECONDS
        if due:
            self.count()
        return due

    def count(self) -> None:
        """Bring the bill up to date and note it."""
        up = self._executor.nodes()
        self._note([replace(self._price(kind), up=count) for kind, count in up.items()])

    def settle(self) -> None:
        """Note what was used until now, with the nodes that were counted last: the cluster may be gone."""
        self._note(self.bill.nodes)

    def _note(self, up: Sequence[Nodes]) -> None:
        now = self._clock()
        self.bill = self.bill.after(now - self._counted_at, up)
        self._counted_at = now
        self._ledger.note(NOTED, json.dumps(self.bill.to_dict()))

    def granted(self, seconds_to_finish: float) -> BudgetAllowance:
        """What the budget allows now; see `budget.granted`."""
        return allowance(self.budget, self.bill, seconds_to_finish)

    def _price(self, kind: NodeType) -> Nodes:
        """Nodes of this kind with their price, none of them up."""
        if kind not in self._priced:
            self._priced[kind] = self._asked(kind)
        return self._priced[kind]

    def _asked(self, kind: NodeType) -> Nodes:
        if self._price_per_hour is not None:
            return Nodes(str(kind), **given_price(self._price_per_hour))
        price = self._ask(kind)
        if price is None:
            return Nodes(str(kind))
        return Nodes(
            str(kind), per_hour=price.per_hour, currency=price.currency, source=price.source, date=price.date,
            at_most=price.at_most,
        )  # fmt: skip
