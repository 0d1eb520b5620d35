"""The records in a store that name the artifact of each recipe and the result of each job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage.manifest import ArtifactRef
from cluster.storage.store import ArtifactStore
from jobs.job import Job, Outcome, Success, outcome_from_dict, outcome_to_dict
from jobs.recipe import Recipe

_ARTIFACTS, _RESULTS = "artifacts/", "results/"
"""Prefixes of record keys."""


@dataclass(frozen=True)
class ResultRecord:
    """The record of a committed result."""

    content: Mapping[str, Any]

    @property
    def outcome(self) -> Outcome:
        return outcome_from_dict(self.content["result"])

    @property
    def artifact(self) -> str:
        """The digest of the artifact that was measured."""
        return str(self.content["result"]["artifact"])

    @property
    def techniques(self) -> list[str]:
        """The names of the techniques of the recipe's steps, which need not exist in this version."""
        return [step["technique"] for step in self.content["recipe"]["steps"]]

    @property
    def meters(self) -> list[str]:
        return list(self.content["meters"])


class ArtifactRecords:
    """The records of one store. A record is created once; the first attempt to commit wins."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def find(self, recipe: Recipe) -> ArtifactRef | None:
        """The artifact of a recipe, made by any study. None if it was never made, or was removed."""
        ref = self.named(recipe.id)
        return ref if ref is not None and self._store.has(ref) else None

    def named(self, recipe_id: str) -> ArtifactRef | None:
        """The artifact that the record of a recipe names, which may have been removed. None without a record."""
        record = self._store.record(_ARTIFACTS + recipe_id)
        return None if record is None else ArtifactRef(**record)

    def commit(self, recipe: Recipe, ref: ArtifactRef) -> ArtifactRef:
        """Record an artifact that was just put into the store. Returns the artifact that counts from now on: this one,
        or the one that another attempt committed before."""
        while not self._store.commit(_ARTIFACTS + recipe.id, dataclasses.asdict(ref)):
            existing = self.find(recipe)
            if existing is not None:
                return existing
            self.forget(recipe.id)  # the record names an artifact that was removed
        return ref

    def forget(self, recipe_id: str) -> None:
        """Remove the record of a recipe's artifact."""
        self._store.forget(_ARTIFACTS + recipe_id)

    def recipe_ids(self) -> Iterator[str]:
        """The ids of all recipes that have a record, sorted."""
        for key in self._store.records(_ARTIFACTS):
            yield key.removeprefix(_ARTIFACTS)

    def result(self, job: Job) -> Outcome | None:
        """The committed result of a job; None without one."""
        record = self._store.record(_RESULTS + job.id)
        return None if record is None else outcome_from_dict(record["result"])

    def commit_result(self, job: Job, outcome: Success) -> Outcome:
        """Record the result of a job. Returns the result that counts: this one, or the one of an earlier attempt."""
        record = {
            "result": outcome_to_dict(outcome),
            "recipe": job.recipe.to_dict(),
            "meters": list(job.meters),
        }
        if self._store.commit(_RESULTS + job.id, record):
            return outcome
        committed = self.result(job)
        if committed is None:
            raise LookupError(
                f"the result of job {job.id} was committed by another attempt, and removed since"
            )
        return committed

    def results(self) -> Iterator[ResultRecord]:
        """All results of the store, sorted by job id."""
        for key in self._store.records(_RESULTS):
            record = self._store.record(key)
            if record is not None:
                yield ResultRecord(record)
