"""The trie of recipes: each node is one step, applied to the model of its parent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs.job import Failure, Job
from jobs.recipe import Recipe
from orchestrator.study.events import Cost


@dataclass(slots=True)
class RecipeNode:
    """One recipe, and the progress of the work on it."""

    recipe: Recipe
    id: str
    parent: str | None
    cost: Cost | None = None
    """Set if the recipe is a candidate."""
    artifact: str | None = None
    is_candidate: bool = False
    """The recipe is a candidate that was not stopped, so it must be measured."""
    fidelity: float = 0.0
    """The largest share of the evaluation that the model was measured on; 0 before the first measurement."""
    timed: bool = False
    failure: Failure | None = None
    """Set if no more attempts are made."""
    job: Job | None = None
    """The job that is running or queued."""
    attempt: int = 0
    """Number of attempts that were started."""
    failed_attempts: int = 0
    """Number of attempts that failed since the last success, apart from preempted ones."""
    exclusive: bool = False
    """The next job needs its node for itself, since the last one ran out of memory."""
    uses: int = 0
    """Number of candidates with this recipe or a descendant of it, without the stopped ones."""
    open: int = 0
    """Number of those candidates that are waiting or running."""
    build_seconds: float = 0.0
    """Duration of the step if no statistics of the parent are reused; 0 before the model was built."""
    children: dict[str, None] = field(default_factory=dict)
    """The ids of the recipes with one step more, in the order in which they were added."""

    @property
    def measured(self) -> bool:
        return self.fidelity > 0


class RecipeTrie:
    """The recipes of all candidates and of the models that they are built from, in the order of their arrival.

    The root is the original. It keeps the counts of candidates per node; the study updates the other fields.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, RecipeNode] = {}
        self.shared_steps = 0
        """Number of steps that candidates share with an earlier one."""

    def __getitem__(self, id: str) -> RecipeNode:
        return self._nodes[id]

    def __iter__(self) -> Iterator[RecipeNode]:
        return iter(self._nodes.values())

    def add(self, recipe: Recipe, cost: Cost) -> list[RecipeNode]:
        """Add a candidate and its ancestors; return the nodes from the original to the candidate."""
        nodes: list[RecipeNode] = []
        parent = None
        for prefix in recipe.lineage():
            node = self._nodes.setdefault(prefix.id, RecipeNode(prefix, prefix.id, parent))
            nodes.append(node)
            parent = node.id
        nodes[0].uses += 1
        for above, below in itertools.pairwise(nodes):
            self.shared_steps += below.uses > 0
            below.uses += 1
            above.children[below.id] = None
        nodes[-1].is_candidate, nodes[-1].cost = True, cost
        return nodes

    def remove_candidate(self, node: RecipeNode) -> None:
        """Stop counting a candidate in `uses`. The nodes stay, since running jobs refer to them."""
        for ancestor in self.lineage(node):
            ancestor.uses -= 1
            self.shared_steps -= ancestor.parent is not None and ancestor.uses > 0
        node.is_candidate = False

    def count_open(self, node: RecipeNode, change: int) -> None:
        """Add `change` to the number of open candidates of a node and its ancestors."""
        for ancestor in self.lineage(node):
            ancestor.open += change

    def lineage(self, node: RecipeNode) -> Iterator[RecipeNode]:
        """Yield this node and its ancestors, the original last."""
        yield node
        while node.parent is not None:
            node = self._nodes[node.parent]
            yield node

    def children(self, node: RecipeNode) -> list[RecipeNode]:
        return [self._nodes[id] for id in node.children]

    def exclusive_nodes(self, node: RecipeNode) -> list[RecipeNode]:
        """Return the models that must still be built for this candidate and for no other one, its own first.

        The list is empty for the original, and if the candidate's model exists or other candidates need it.
        """
        if node.parent is None:
            return []
        nodes = []
        for ancestor in self.lineage(node):
            if ancestor.artifact is not None or ancestor.open != 1:
                break
            nodes.append(ancestor)
        return nodes

    def is_planned(self, id: str) -> bool:
        """Whether the model with this recipe exists, is needed by an open candidate, or failed to be built."""
        node = self._nodes.get(id)
        return node is not None and (node.artifact is not None or node.open > 0 or node.failure is not None)

    @property
    def unbuilt_recipes(self) -> list[Recipe]:
        """The recipes that open candidates need and that have no model yet."""
        return [
            node.recipe
            for node in self._nodes.values()
            if node.open > 0 and node.artifact is None and node.parent is not None
        ]

    @property
    def shared_seconds(self) -> float:
        """The time that building the shared steps again for each candidate would have taken.

        Steps that were not built yet count 0 s.
        """
        steps = (node for node in self._nodes.values() if node.parent is not None)
        return sum((node.uses - 1) * node.build_seconds for node in steps)
