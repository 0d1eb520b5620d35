"""Knapsack: select one choice for each item so that the total error is least within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_STATES = 20_000
"""The largest number of budgets that dynamic programming distinguishes; costs are rounded up to whole units if
their common divisor would give more."""


def least_error(
    costs: Int[Tensor, "items choices"], errors: Float[Tensor, "items choices"], budget: int
) -> list[int]:
    """Return the choice of each item for which the sum of errors is least and the sum of costs within `budget`.

    This is the multiple-choice knapsack problem, solved by dynamic programming over the budget (Kellerer,
    Pferschy & Pisinger 2004, Knapsack Problems, ch. 11). It is exact if `_STATES` units of cost suffice, and
    never worse than the same choice for all items. Raises ValueError if even the cheapest choices exceed
    the budget.
    """
    cheapest = int(costs.amin(dim=1).sum())
    if cheapest > budget:
        raise ValueError(f"the cheapest choices cost {cheapest}, more than the budget of {budget}")
    unit = math.gcd(*costs.flatten().tolist()) or 1
    unit = max(unit, math.ceil(budget / _STATES))
    solutions = [_solve(-(-costs // unit), errors.double(), budget // unit)]
    solutions += [[choice] * len(costs) for choice in range(costs.shape[1])]
    solutions.append(costs.argmin(dim=1).tolist())
    feasible = [choices for choices in solutions if choices and _total(costs, choices) <= budget]
    return min(feasible, key=lambda choices: _total(errors.double(), choices))


def _solve(
    costs: Int[Tensor, "items choices"], errors: Float[Tensor, "items choices"], budget: int
) -> list[int]:
    """Return the best choices within a budget of whole units; none if the rounded costs exceed it."""
    best_errors = torch.zeros(budget + 1, dtype=torch.float64)
    best_choices = []
    for item_costs, item_errors in zip(costs.tolist(), errors.tolist(), strict=True):
        totals = torch.full((len(item_costs), budget + 1), math.inf, dtype=torch.float64)
        for choice, (units, error) in enumerate(zip(item_costs, item_errors, strict=True)):
            if units <= budget:
                totals[choice, units:] = best_errors[: budget + 1 - units] + error
        best_errors, choices = totals.min(dim=0)
        best_choices.append(choices.to(torch.uint8))
    if math.isinf(best_errors[budget].item()):
        return []
    remaining = budget
    solution = []
    for item_costs, choices in zip(reversed(costs.tolist()), reversed(best_choices), strict=True):
        choice = int(choices[remaining])
        solution.append(choice)
        remaining -= item_costs[choice]
    return solution[::-1]


def _total(values: Tensor, choices: Sequence[int]) -> float:
    selected = values.gather(1, torch.tensor(choices).unsqueeze(1))
    return float(selected.sum().item())
