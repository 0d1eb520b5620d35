"""A recipe: the origin of a model and every step after it. Its id names the artifact on every machine."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs import techniques
from jobs.models.layout import Layout
from jobs.technique import Technique


@dataclass(frozen=True)
class Origin:
    """The root of every recipe of a study: the model's files, the data that steps read, and the seed."""

    model_digest: str
    data_digest: str
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A path in the trie of steps. Without steps it is the original."""

    origin: Origin
    steps: tuple[Technique, ...] = ()

    def then(self, step: Technique) -> Recipe:
        """Return this recipe with one more step. A step that changes nothing is left out."""
        if step.is_noop:
            return self
        return Recipe(self.origin, (*self.steps, step))

    @property
    def parent(self) -> Recipe | None:
        if not self.steps:
            return None
        return Recipe(self.origin, self.steps[:-1])

    def lineage(self) -> list[Recipe]:
        """Return the recipes from the original to this one, both included."""
        return [*self._ancestors, self]

    @functools.cached_property
    def _ancestors(self) -> tuple[Recipe, ...]:
        return tuple(Recipe(self.origin, self.steps[:length]) for length in range(len(self.steps)))

    def layout(self, original: Layout) -> Layout:
        """Return the layout of the resulting model. Raises ValueError if a step cannot be applied."""
        layout = original
        for step in self.steps:
            layout = step.output_layout(layout)
        return layout

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits of the digest of the origin and each step's name, version and options."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return " → ".join(str(step) for step in self.steps) or "original"

    def to_dict(self) -> dict[str, Any]:
        return {
            "origin": {
                "model_digest": self.origin.model_digest,
                "data_digest": self.origin.data_digest,
                "seed": self.origin.seed,
            },
            "steps": [
                {"technique": step.name(), "version": step.version, "options": step.options()}
                for step in self.steps
            ],
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` described. Raises ValueError if a technique has another version here."""
        steps = []
        for entry in record["steps"]:
            technique = techniques.load(entry["technique"])
            if technique.version != entry["version"]:
                raise ValueError(
                    f"the recipe was made with {entry['technique']} version {entry['version']}, "
                    f"this slimfront has version {technique.version}: their results differ"
                )
            steps.append(technique.of(entry["options"]))
        return Recipe(Origin(**record["origin"]), tuple(steps))
