"""A job, one step from one parent, and its outcome. Plain data that crosses processes; needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe

FailureKind = Literal["invalid", "diverged", "out_of_memory", "disk_full", "preempted", "timeout", "bug"]


@dataclass(frozen=True)
class Job:
    """Make the artifact of `recipe` from its parent's, unless it exists, then take the meters."""

    recipe: Recipe
    meters: tuple[str, ...]
    materials_digest: str
    fidelity: float = 1.0
    """Share of the evaluation data to measure on."""
    after: float = 0.0
    """Share that the same meters measured before. If that result still exists, its items are not read again. It does
    not affect the result."""

    @property
    def id(self) -> str:
        """The digest of everything that decides the result: the key of its record in the store."""
        parts = [self.recipe.id, list(self.meters), self.materials_digest, self.fidelity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def before(self) -> Job | None:
        """The job that measured the share `after`."""
        if not self.after:
            return None
        return dataclasses.replace(self, fidelity=self.after, after=0.0)


@dataclass(frozen=True)
class Success:
    """The result of a job that ended well."""

    artifact: str
    """Content digest of the artifact in the store."""
    size_bytes: int
    """Bytes of the artifact's whole folder."""
    measurement: Measurement
    seconds: float
    """Time to make the artifact."""
    saved_seconds: float = 0.0
    """Time that cached statistics saved."""
    found: bool = False
    """Whether the result existed already and nothing ran."""


@dataclass(frozen=True)
class Failure:
    """The result of a job that ended with an error."""

    kind: FailureKind
    message: str
    traceback: str = ""


Outcome = Success | Failure


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as plain data. It shares mutable values with the outcome: write it, do not change it."""
    record = {"outcome": type(outcome).__name__.lower(), **vars(outcome)}
    if isinstance(outcome, Success):
        record["measurement"] = dict(vars(outcome.measurement))
    return record


_OLD_FIELDS = {"spared_seconds": "saved_seconds"}
"""Names of fields in records that version 0.1.0 wrote."""


def outcome_from_dict(record: Mapping[str, Any]) -> Outcome:
    """Return the outcome that `outcome_to_dict` described, also by version 0.1.0."""
    fields = {_OLD_FIELDS.get(name, name): value for name, value in record.items() if name != "outcome"}
    if record["outcome"] == "failure":
        return Failure(**fields)
    measurement = {**fields.pop("measurement")}
    measurement["unreliable"] = tuple(measurement["unreliable"])
    return Success(measurement=Measurement(**measurement), **fields)
