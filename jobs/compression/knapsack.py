"""Knapsack: one choice for each item, of least total error within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_STATES = 20_000
"""Budgets that are told apart at most; where the costs' common divisor gives more, costs are rounded up."""


def least_error(
    costs: Int[Tensor, "items choices"], errors: Float[Tensor, "items choices"], budget: int
) -> list[int]:
    """Which choice each item gets, so that the sum of errors is least and that of costs within `budget`.

    The multiple-choice knapsack problem, solved by dynamic programming over the budget (Kellerer, Pferschy &
    Pisinger 2004, Knapsack Problems, ch. 11): exact as long as `_STATES` units of cost suffice. It is never
    worse than giving all items the same choice. ValueError where even the cheapest choices cost more.
    """
    cheapest = int(costs.amin(dim=1).sum())
    if cheapest > budget:
        raise ValueError(f"the cheapest choices cost {cheapest}, more than the budget of {budget}")
    unit = math.gcd(*costs.flatten().tolist()) or 1
    unit = max(unit, math.ceil(budget / _STATES))
    found = [_solved(-(-costs // unit), errors.double(), budget // unit)]
    found += [[choice] * len(costs) for choice in range(costs.shape[1])]
    found.append(costs.argmin(dim=1).tolist())
    fitting = [chosen for chosen in found if chosen and _total(costs, chosen) <= budget]
    return min(fitting, key=lambda chosen: _total(errors.double(), chosen))


def _solved(
    costs: Int[Tensor, "items choices"], errors: Float[Tensor, "items choices"], budget: int
) -> list[int]:
    """The best choices within a budget of whole units; none where rounding costs up left no room."""
    least = torch.zeros(budget + 1, dtype=torch.float64)
    taken = []
    for cost, error in zip(costs.tolist(), errors.tolist(), strict=True):
        options = torch.full((len(cost), budget + 1), math.inf, dtype=torch.float64)
        for choice, (units, loss) in enumerate(zip(cost, error, strict=True)):
            if units <= budget:
                options[choice, units:] = least[: budget + 1 - units] + loss
        least, chosen = options.min(dim=0)
        taken.append(chosen.to(torch.uint8))
    if math.isinf(least[budget].item()):
        return []
    left, made = budget, []
    for cost, chosen in zip(reversed(costs.tolist()), reversed(taken), strict=True):
        made.append(int(chosen[left]))
        left -= cost[made[-1]]
    return made[::-1]


def _total(values: Tensor, chosen: Sequence[int]) -> float:
    picked = values.gather(1, torch.tensor(chosen).unsqueeze(1))
    return float(picked.sum().item())
