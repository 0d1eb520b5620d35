"""Job: one step from one parent, and what came of it. Plain data that crosses processes; needs no torch."""

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
    """Make `recipe`'s artifact from its parent's (unless it is there already), then take these meters.

    fidelity: the share of the evaluation data that is measured on, 1.0 for all.
    after: the share that it was measured on before, by the same meters: what was seen of that need not be read again
        if that job's result is still there. It decides nothing of the result.
    """

    recipe: Recipe
    meters: tuple[str, ...]
    materials_digest: str
    fidelity: float = 1.0
    after: float = 0.0

    @property
    def id(self) -> str:
        """The digest of all that decides the result: the key of its record in the store."""
        parts = [self.recipe.id, list(self.meters), self.materials_digest, self.fidelity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def before(self) -> Job | None:
        """The job that measured the share `after`."""
        return dataclasses.replace(self, fidelity=self.after, after=0.0) if self.after else None


@dataclass(frozen=True)
class Success:
    """artifact: its content digest in the store; size_bytes: of the whole folder; seconds: making it took.

    spared_seconds: making it would have taken so much longer without statistics that were there.
    found: nothing ran now: the result was there.
    """

    artifact: str
    size_bytes: int
    measurement: Measurement
    seconds: float
    saved_seconds: float = 0.0
    found: bool = False


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    message: str
    traceback: str = ""


Outcome = Success | Failure


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain data, which shares what it holds: to be written, not changed."""
    found = {"outcome": type(outcome).__name__.lower(), **vars(outcome)}
    if isinstance(outcome, Success):
        found["measurement"] = dict(vars(outcome.measurement))
    return found


_OLD_FIELDS = {"spared_seconds": "saved_seconds"}
"""Names of fields in records that version 0.1.0 wrote."""


def outcome_from_dict(record: Mapping[str, Any]) -> Outcome:
    fields = {_OLD_FIELDS.get(name, name): value for name, value in record.items() if name != "outcome"}
    if record["outcome"] == "failure":
        return Failure(**fields)
    measurement = {**fields.pop("measurement")}
    measurement["unreliable"] = tuple(measurement["unreliable"])
    return Success(measurement=Measurement(**measurement), **fields)
