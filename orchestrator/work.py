"""Work: what runs on a worker. Fetch from the store, let `jobs` do it, put back: the one place where both meet."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.store import ArtifactRef, ArtifactStore, open_store
from jobs import run
from jobs.job import (
    Failure,
    Job,
    Materials,
    Outcome,
    Success,
    outcome_from_dict,
    outcome_to_dict,
)
from jobs.recipe import Recipe


@dataclass(frozen=True)
class Workplace:
    """What all work of a study shares.

    scratch: where jobs in progress lie, best on the store's file system; it is the study's own. Checkpoints
        of a training lie there too, so that another attempt can go on from them.
    cache: where statistics lie that any study's jobs may share.
    """

    materials: Materials
    store: str
    scratch: Path
    cache: Path


def work(job: Job, workplace: Workplace) -> Outcome:
    """Do one job, or find it done. Its result exists from the moment its record is committed, and only then.

    Any number of attempts may run at once or after each other: the first to commit wins, all return what won.
    """
    try:
        return _work(job, workplace)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        return run.failure(error)


def _work(job: Job, workplace: Workplace) -> Outcome:
    store = open_store(workplace.store)
    done = store.record(_result_key(job))
    if done is not None:
        return outcome_from_dict(done["result"])
    workplace.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workplace.scratch) as scratch:
        outcome = _attempt(job, workplace, store, Path(scratch))
    if isinstance(outcome, Success) or outcome.kind in ("invalid", "diverged"):
        # No other attempt will follow.
        shutil.rmtree(_checkpoints(job, workplace), ignore_errors=True)
    if isinstance(outcome, Failure):
        return outcome  # another attempt may go better: only results are committed
    record = {"result": outcome_to_dict(outcome), "recipe": job.recipe.to_dict(), "meters": list(job.meters)}
    if store.commit(_result_key(job), record):
        return outcome
    return outcome_from_dict(_committed(store, _result_key(job))["result"])


def _attempt(job: Job, workplace: Workplace, store: ArtifactStore, scratch: Path) -> Outcome:
    built = artifact_of(job.recipe, store)
    parent = None if job.recipe.parent is None else artifact_of(job.recipe.parent, store)
    made = run.attempt(
        job,
        workplace.materials,
        parent=None if parent is None or built is not None else _fetched(store, parent, scratch / "parent"),
        built=None if built is None else _fetched(store, built, scratch / "built"),
        folder=scratch / "made",
        cache=workplace.cache,
        report=_unreported,
        checkpoints=_checkpoints(job, workplace),
    )
    if isinstance(made, Failure):
        return made
    if built is not None:
        return Success(built.digest, built.size_bytes, made.measurement, made.seconds)
    ref = store.put(scratch / "made")
    if not store.commit(_artifact_key(job.recipe), dataclasses.asdict(ref)):
        winner = artifact_of(job.recipe, store)
        if winner != ref:
            # Somebody else's copy of this model came first and differs in its last bits: what counts is
            # measured on the copy that counts.
            return _attempt(job, workplace, store, scratch / "again")
    return Success(ref.digest, ref.size_bytes, made.measurement, made.seconds)


def _checkpoints(job: Job, workplace: Workplace) -> Path:
    return workplace.scratch / "checkpoints" / job.recipe.id


def artifact_of(recipe: Recipe, store: ArtifactStore) -> ArtifactRef | None:
    """Where this recipe's model is held, by any study; None if nobody has made it or it was removed."""
    record = store.record(_artifact_key(recipe))
    if record is None:
        return None
    ref = ArtifactRef(**record)
    return ref if store.has(ref) else None


def _fetched(store: ArtifactStore, ref: ArtifactRef, folder: Path) -> Path:
    store.fetch(ref, folder)
    return folder


def _committed(store: ArtifactStore, key: str) -> Mapping[str, Any]:
    record = store.record(key)
    if record is None:
        raise LookupError(f"the record {key} was committed by another attempt and is gone again")
    return record


def _result_key(job: Job) -> str:
    return f"results/{job.id}"


def _artifact_key(recipe: Recipe) -> str:
    return f"artifacts/{recipe.id}"


def _unreported(share: float, what: str) -> None:
    """Progress within a job is not shown yet."""
