"""Candidate: one recipe of a study and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jobs.job import Failure
from jobs.knobs import Value
from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe

State = Literal["waiting", "running", "measured", "failed", "over_limit", "stopped"]


@dataclass(frozen=True)
class Candidate:
    """choices: what the search chose. size_bytes: of the weights, exact, known before anything runs.

    `over_limit` candidates break a limit by their exact size and never run. `measured` ones may still lack
    the exclusive metrics (latency), which are taken only of what may be on the front. stopped: why a candidate was
    given up before it was measured. predicted: what a table of operations said of metrics that were measured since, to
    tell how far it was off; no result. fidelity: the share of the evaluation that it was measured on. rungs: what it
    was measured at on smaller shares before.
    """

    recipe: Recipe
    state: State
    size_bytes: int
    choices: Mapping[str, Value] = field(default_factory=dict)
    artifact: str | None = None
    measurement: Measurement | None = None
    failure: Failure | None = None
    stopped: str | None = None
    attempts: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)
    fidelity: float = 1.0
    rungs: Mapping[float, Mapping[str, float]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.recipe.id
