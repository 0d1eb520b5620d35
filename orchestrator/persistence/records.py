"""The records in a store that say which artifacts and results exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluster.storage.manifest import ArtifactRef
from cluster.storage.store import ArtifactStore
from jobs.job import Job
from jobs.recipe import Recipe


def artifact_of(recipe: Recipe, store: ArtifactStore) -> ArtifactRef | None:
    """Where this recipe's model is held, by any study; None if nobody has made it or it was removed."""
    record = store.record(artifact_key(recipe))
    if record is None:
        return None
    ref = ArtifactRef(**record)
    return ref if store.has(ref) else None


def held_artifact(recipe: Recipe, made: ArtifactRef, store: ArtifactStore) -> ArtifactRef:
    """The artifact that counts as this recipe's: the one that was just made and put, unless another is held."""
    while not store.commit(artifact_key(recipe), dataclasses.asdict(made)):
        held = artifact_of(recipe, store)
        if held is not None:
            return held
        store.forget(artifact_key(recipe))  # it names what was removed
    return made


def committed_result(store: ArtifactStore, key: str) -> Mapping[str, Any]:
    record = store.record(key)
    if record is None:
        raise LookupError(f"the record {key} was committed by another attempt and is gone again")
    return record


def result_key(job: Job) -> str:
    return f"results/{job.id}"


def artifact_key(recipe: Recipe) -> str:
    return f"artifacts/{recipe.id}"
