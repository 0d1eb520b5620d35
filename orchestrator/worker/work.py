"""Work: what runs on a worker. Fetch from the store, let `jobs` do it, put back: the one place where both meet."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster.cloud.preemption import latest_notice
from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import is_remote, open_store
from cluster.storage.store import ArtifactStore
from jobs import failures, run
from jobs.job import Failure, Job, Outcome, Success, outcome_from_dict, outcome_to_dict
from jobs.materials import Materials
from jobs.measurement.measurement import Measurement
from jobs.parallel import Sharing
from jobs.progress import JobInterruptedError, Report
from jobs.recipe import Recipe
from jobs.training import ranks
from orchestrator.persistence import inputs
from orchestrator.persistence.records import artifact_of, committed_result, held_artifact, result_key
from orchestrator.persistence.study_folder import CHECKPOINTS, DOWNLOADS
from orchestrator.worker import checkpoint_sync
from orchestrator.worker.watchdog import Lease

LEAVING_SECONDS = 5.0
"""So long work waits that is handed to a machine which is about to go, before it is given back."""
_PUT_SECONDS = 0.5
"""How often a rank looks whether the first has put what both have made."""


@dataclass(frozen=True)
class WorkerContext:
    """What all work of a study shares.

    scratch: where jobs in progress lie, best on the store's file system; it is the study's own. Beside it
        lie the checkpoints of trainings, which outlive attempts and a study that was killed.
    cache: where statistics lie that any study's jobs may share.
    sharing: how trainings are spread over ranks.
    """

    materials: Materials
    store: str
    scratch: Path
    cache: Path
    sharing: Sharing = field(default_factory=Sharing)


def work(job: Job, workplace: WorkerContext) -> Outcome | None:
    """Do one job, or find it done. Its result exists from the moment its record is committed, and only then.

    Any number of attempts may run at once or after each other: the first to commit wins, all return what won. Of
    several ranks the first returns the outcome; another one returns None, or why it could not go on.
    """
    lease = Lease()
    try:
        outcome = _work(job, workplace)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        outcome = failures.failure(error)
    finally:
        lease.end()
    if isinstance(outcome, Success):
        # For whoever measures on from here, who finds it in the store.
        return dataclasses.replace(outcome, measurement=dataclasses.replace(outcome.measurement, observed={}))
    if outcome is not None and outcome.kind == "disk_full":
        return dataclasses.replace(outcome, message=f"{outcome.message}; {_cure(workplace)}")
    return outcome


def rebuild_artifact(recipe: Recipe, workplace: WorkerContext) -> ArtifactRef:
    """Where this recipe's model is held; what was removed of its lineage is made again. RuntimeError if it can't be."""
    store = open_artifact(workplace)
    held = artifact_of(recipe, store)
    if held is not None:
        return held
    inputs.bring(workplace.materials, store, workplace.cache.parent)
    with _scratch(workplace) as scratch:
        outcome = _attempt(Job(recipe, (), ""), workplace, store, Path(scratch))
    if isinstance(outcome, Failure):
        raise RuntimeError(f"{recipe} could not be made again: {outcome.message}")
    assert outcome is not None  # a single process does this
    return ArtifactRef(outcome.artifact, outcome.size_bytes)


def open_artifact(workplace: WorkerContext) -> ArtifactStore:
    """The store, with copies on this machine where it is elsewhere. One in a bucket is kept: its client takes 0.1 s to
    make."""
    downloads = workplace.cache.with_name(DOWNLOADS)
    opening = _kept_open if is_remote(workplace.store) else open_store
    return opening(workplace.store, downloads)


@functools.lru_cache(2)
def _kept_open(address: str, downloads: Path | None) -> ArtifactStore:
    return open_store(address, downloads)


def _cure(workplace: WorkerContext) -> str:
    full = "a disk is full: make room, then resume the study"
    if is_remote(workplace.store):
        return f"{full}. {workplace.cache.parent} holds what is kept here; cache_gb of the store's address bounds it"
    return f"{full}. `slimfront store {workplace.store} --trim SIZE` removes what can be made again"


def _work(job: Job, workplace: WorkerContext) -> Outcome | None:
    store = open_artifact(workplace)
    # Only the first rank looks whether there is anything to do: if there is, all must take part.
    done = store.record(result_key(job)) if ranks.here().first else None
    if done is not None:
        return _found(outcome_from_dict(done["result"]))
    if latest_notice() is not None:
        # Who hands out work learns of the notice too, a little later: until then it would come back at once.
        time.sleep(LEAVING_SECONDS)
        _stop_at_notice()
    inputs.bring(workplace.materials, store, workplace.cache.parent)
    with _scratch(workplace) as scratch:
        outcome = _attempt(job, workplace, store, Path(scratch))
    if not isinstance(outcome, Success):
        return outcome  # another attempt may go better: only results are committed
    record = {"result": outcome_to_dict(outcome), "recipe": job.recipe.to_dict(), "meters": list(job.meters)}
    if store.commit(result_key(job), record):
        return outcome
    return outcome_from_dict(committed_result(store, result_key(job))["result"])


def _scratch(workplace: WorkerContext) -> tempfile.TemporaryDirectory[str]:
    """A folder of this process; what others that are gone left on this machine, killed half way, is removed."""
    workplace.scratch.mkdir(parents=True, exist_ok=True)
    machine = socket.gethostname()
    for left in workplace.scratch.iterdir():
        name = left.name.split("~")
        if len(name) == 3 and name[0] == machine and not _runs(int(name[1])):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{machine}~{os.getpid()}~", dir=workplace.scratch)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _found(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, found=True) if isinstance(outcome, Success) else outcome


def _attempt(job: Job, workplace: WorkerContext, store: ArtifactStore, scratch: Path) -> Outcome | None:
    outcome = _done(job, workplace, store, scratch)
    if outcome is None:
        return None
    if isinstance(outcome, Success) or outcome.kind in ("invalid", "diverged"):
        # No other attempt will follow.
        forget_training(job.recipe, workplace.scratch.with_name(CHECKPOINTS), workplace.store)
    return outcome


def _done(job: Job, workplace: WorkerContext, store: ArtifactStore, scratch: Path) -> Outcome | None:
    scratch.mkdir(exist_ok=True)
    built = _fetched(job.recipe, store, scratch / "built") if ranks.here().first else None
    if built is not None:
        return _measured(job, workplace, store, built, scratch)
    parent = _parent(job, workplace, store, scratch)
    if isinstance(parent, Failure):
        return parent
    made = _made(job.recipe, workplace, parent, scratch)
    if made is None or isinstance(made, Failure):
        return made
    # Put before it is measured: an interruption of that does not undo what was made.
    ref = store.put(scratch / "made")
    if held_artifact(job.recipe, ref, store) != ref:
        # Somebody else's copy of this model came first and differs in its last bits: what counts is
        # measured on the copy that counts.
        return _attempt(job, workplace, store, scratch / "again")
    success = Success(ref.digest, ref.size_bytes, made.measurement, made.seconds, made.saved_seconds)
    if not job.meters:
        return success
    outcome = _measured(job, workplace, store, _Fetched(ref, scratch / "made"), scratch)
    if not isinstance(outcome, Success):
        return outcome
    return dataclasses.replace(success, measurement=outcome.measurement)


def _made(
    recipe: Recipe, workplace: WorkerContext, parent: _Fetched | None, scratch: Path
) -> run.JobOutput | Failure | None:
    """Make the recipe's model from its parent's, in `scratch / "made"`. A training goes on from where another attempt
    left it, wherever that was. None on ranks that are not the first."""
    folder = _checkpoints(recipe, workplace)
    sending = None
    if _travels(recipe, workplace.store) and ranks.here().first:
        store = _kept_open(workplace.store, None)
        checkpoint_sync.bring(recipe.id, store, folder)
        sending = checkpoint_sync.Sending(recipe.id, store, folder, scratch)
    made = run.attempt(
        Job(recipe, (), ""),
        workplace.materials,
        parent=None if parent is None else parent.folder,
        built=None,
        folder=scratch / "made",
        cache=workplace.cache,
        report=_reporting(sending),
        checkpoints=folder,
        sharing=workplace.sharing,
    )
    if sending is not None:
        if isinstance(made, Failure) and made.kind == "preempted":
            sending.last()
        else:
            sending.end()
    return made


def _measured(
    job: Job, workplace: WorkerContext, store: ArtifactStore, built: _Fetched, scratch: Path
) -> Outcome | None:
    made = run.attempt(
        job,
        workplace.materials,
        parent=None,
        built=built.folder,
        folder=scratch / "measured",
        cache=workplace.cache,
        report=_reporting(None),
        before=_before(job, built.ref, store),
    )
    if not isinstance(made, run.JobOutput):
        return made
    return Success(built.ref.digest, built.ref.size_bytes, made.measurement, made.seconds)


def _reporting(sending: checkpoint_sync.Sending | None) -> Report:
    """Stops the job where its machine is to be taken away, and lets checkpoints be sent meanwhile."""
    lease = Lease()

    def report(share: float, what: str) -> None:
        lease.renew()
        _stop_at_notice()
        if sending is not None:
            sending()

    return report


def _stop_at_notice() -> None:
    notice = latest_notice()
    if notice is not None:
        raise JobInterruptedError(f"{notice.source} takes this machine away")


def forget_training(recipe: Recipe, folder: Path, store: str) -> None:
    """Remove what a training that nobody goes on with would have gone on from, in the folder of a study's checkpoints
    and in its store. What a store that is out of reach keeps goes when the study ends."""
    shutil.rmtree(folder / recipe.id, ignore_errors=True)
    if _travels(recipe, store):
        with contextlib.suppress(OSError):
            checkpoint_sync.drop({recipe.id}, _kept_open(store, None))


def _travels(recipe: Recipe, store: str) -> bool:
    """Whether this recipe's checkpoints are put into the store: one in a folder is seen from where they lie anyway."""
    return is_remote(store) and bool(recipe.steps) and recipe.steps[-1].trains()


def _before(job: Job, ref: ArtifactRef, store: ArtifactStore) -> Measurement | None:
    """What the job before found of this very artifact; None where its result is not there."""
    record = None if job.before is None else store.record(result_key(job.before))
    outcome = None if record is None else outcome_from_dict(record["result"])
    if isinstance(outcome, Success) and outcome.artifact == ref.digest:
        return outcome.measurement
    return None


@dataclass(frozen=True)
class _Fetched:
    """An artifact and the folder that it was fetched into."""

    ref: ArtifactRef
    folder: Path


def _parent(
    job: Job, workplace: WorkerContext, store: ArtifactStore, scratch: Path
) -> _Fetched | Failure | None:
    """The parent's artifact; where it was removed it is made again first, from its own parent. None of the original."""
    recipe = job.recipe.parent
    if recipe is None:
        return None
    found = _fetched(recipe, store, scratch / "parent")
    if found is not None:
        return found
    step = dataclasses.replace(job, recipe=recipe, meters=())
    outcome = _attempt(step, workplace, store, scratch / "lineage")
    shutil.rmtree(scratch / "lineage", ignore_errors=True)
    if isinstance(outcome, Failure):
        return dataclasses.replace(outcome, message=f"{recipe} could not be made again: {outcome.message}")
    while outcome is None and artifact_of(recipe, store) is None:
        time.sleep(_PUT_SECONDS)  # the first rank is about to put it
    return _fetched(recipe, store, scratch / "parent")


def _fetched(recipe: Recipe, store: ArtifactStore, folder: Path) -> _Fetched | None:
    """This recipe's artifact in `folder`; None where it is not held."""
    ref = artifact_of(recipe, store)
    if ref is None:
        return None
    try:
        store.fetch(ref, folder)
    except LookupError:  # removed at this moment
        return None
    return _Fetched(ref, folder)


def _checkpoints(recipe: Recipe, workplace: WorkerContext) -> Path:
    return workplace.scratch.with_name(CHECKPOINTS) / recipe.id
