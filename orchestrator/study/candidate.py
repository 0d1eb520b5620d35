"""Candidate: one recipe of a study, with its state and its measurements."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jobs.job import Failure
from jobs.knobs import Value
from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe

State = Literal["waiting", "running", "measured", "failed", "over_limit", "stopped"]
"""`over_limit`: the exact size exceeds a limit, so the candidate never runs. `measured`: exclusive metrics (latency)
may still be missing, since only candidates that may be on the front are timed. `stopped`: given up before it was
measured."""


@dataclass(frozen=True)
class Candidate:
    """One recipe of a study, with its state and its measurements."""

    recipe: Recipe
    state: State
    size_bytes: int
    """Size of the weights, exact, known before execution."""
    choices: Mapping[str, Value] = field(default_factory=dict)
    """The choices of the search that led to this recipe; empty for the original."""
    artifact: str | None = None
    measurement: Measurement | None = None
    failure: Failure | None = None
    stopped: str | None = None
    """The reason why the candidate was stopped."""
    attempts: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Predictions of the latency table for metrics that were measured later, to report its errors; no results."""
    fidelity: float = 1.0
    """The share of the evaluation that the measurement covers."""
    rungs: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    """The metrics on smaller shares of the evaluation, by share."""

    @property
    def id(self) -> str:
        return self.recipe.id

    def with_measurement(self, measurement: Measurement, fidelity: float) -> Candidate:
        """Return the candidate after one more measurement.

        fidelity: the largest share of the evaluation that it was measured on, with this measurement. Items are stored
        as arrays of numbers, since a study holds those of thousands of candidates.
        """
        items = {metric: array("d", values) for metric, values in measurement.items.items()}
        compact = dataclasses.replace(measurement, items=items)
        if self.measurement is None:
            return dataclasses.replace(self, state="measured", measurement=compact, fidelity=fidelity)
        rungs = dict(self.rungs)
        if self.fidelity < fidelity:
            rungs[self.fidelity] = {
                metric: self.measurement.metrics[metric] for metric in self.measurement.items
            }
        joined = self.measurement.joined(compact)
        return dataclasses.replace(self, state="measured", measurement=joined, fidelity=fidelity, rungs=rungs)

    def with_predictions(self, predictions: Mapping[str, float]) -> Candidate:
        """Return the candidate with the predictions for those metrics that were measured."""
        measured = self.measurement.metrics.keys() if self.measurement else ()
        predicted = {metric: value for metric, value in predictions.items() if metric in measured}
        return dataclasses.replace(self, predicted=predicted)
