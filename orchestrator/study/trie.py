"""The trie of recipes: each node is one step from one parent."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.job import Failure, Job
from jobs.recipe import Recipe
from orchestrator.study.events import Cost


@dataclass(slots=True)
class RecipeNode:
    """One recipe of the trie and how far it is. children: the ids of what is made from it, in their order.

    uses: how many candidates come from it, or are it, but for those that were given up; open: how many of them are
    under way; alone_seconds: what making it from its parent takes without statistics that are there.
    """

    recipe: Recipe
    id: str
    parent: str | None
    cost: Cost | None = None
    artifact: str | None = None
    wanted: bool = False
    fidelity: float = 0.0
    timed: bool = False
    failure: Failure | None = None
    job: Job | None = None
    attempt: int = 0
    failed_attempts: int = 0
    exclusive: bool = False
    uses: int = 0
    open: int = 0
    exclusive_subtree_seconds: float = 0.0
    children: dict[str, None] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return self.fidelity > 0
