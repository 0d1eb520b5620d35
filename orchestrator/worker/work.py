"""Do a job on a worker: fetch from the store, run the job, commit the result. Here `jobs` and `cluster` meet."""

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
from jobs.job import Failure, Job, Outcome, Success
from jobs.materials import Materials
from jobs.measurement.measurement import Measurement
from jobs.parallel import Sharing
from jobs.progress import JobInterruptedError, Report
from jobs.recipe import Recipe
from jobs.run import JobDirs, JobOutput, RankDone, WorkRequest
from jobs.training import ranks
from orchestrator.persistence import inputs
from orchestrator.persistence.records import ArtifactRecords
from orchestrator.persistence.study_folder import CHECKPOINTS, DOWNLOADS
from orchestrator.worker import checkpoint_sync
from orchestrator.worker.watchdog import Lease

LEAVING_SECONDS = 5.0
"""A job that reaches a machine with a termination notice waits this long before it is returned. The scheduler learns of
the notice a little later, and would send the job back at once."""
_POLL_SECONDS = 0.5
"""How often a rank checks whether the first rank has put the artifact that both have made."""


@dataclass(frozen=True)
class WorkerContext:
    """The settings that all jobs of a study share on one machine."""

    materials: Materials
    store: str
    """The address of the store."""
    scratch: Path
    """The study's folder for jobs in progress, best on the store's file system."""
    cache: Path
    """The folder of statistics that the jobs of all studies share."""
    sharing: Sharing = field(default_factory=Sharing)
    """How trainings are spread over ranks."""

    @property
    def checkpoints(self) -> Path:
        """The study's folder of training checkpoints, which outlive attempts and a killed study."""
        return self.scratch.with_name(CHECKPOINTS)

    @property
    def downloads(self) -> Path:
        """The folder of copies of artifacts, if the store is remote."""
        return self.cache.with_name(DOWNLOADS)

    @property
    def home(self) -> Path:
        """The local folder of all studies of the store."""
        return self.cache.parent


def work(job: Job, context: WorkerContext) -> Outcome | None:
    """Do a job, or find its result. The result exists from the moment its record is committed.

    Any number of attempts may run at once or in turn: the first to commit wins, and all return its result. Of several
    ranks the first returns the outcome; another rank returns None, or its own failure.
    """
    lease = Lease()
    try:
        outcome = _work(job, context)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        outcome = failures.failure(error)
    finally:
        lease.end()
    if isinstance(outcome, RankDone):
        return None
    if isinstance(outcome, Success):
        # Observations of single items stay in the store, where the next, longer measurement reads them.
        return dataclasses.replace(outcome, measurement=dataclasses.replace(outcome.measurement, observed={}))
    if outcome.kind == "disk_full":
        return dataclasses.replace(outcome, message=f"{outcome.message}; {_advice_for_full_disk(context)}")
    return outcome


def rebuild_artifact(recipe: Recipe, context: WorkerContext) -> ArtifactRef:
    """The artifact of a recipe. If it was removed it is made again, with its removed ancestors. RuntimeError if that
    fails."""
    store = _open(context)
    existing = ArtifactRecords(store).find(recipe)
    if existing is not None:
        return existing
    inputs.bring(context.materials, store, context.home)
    with _scratch(context) as scratch:
        outcome = _attempt(Job(recipe, (), ""), context, store, Path(scratch))
    if isinstance(outcome, Failure):
        raise RuntimeError(f"{recipe} could not be made again: {outcome.message}")
    assert isinstance(outcome, Success)  # this process is the only rank
    return ArtifactRef(outcome.artifact, outcome.size_bytes)


def forget_training(recipe: Recipe, checkpoints: Path, store: str) -> None:
    """Remove the checkpoints of a training that no attempt will resume, from the study's folder of checkpoints and from
    its store. If the store cannot be reached they are removed when the study ends."""
    shutil.rmtree(checkpoints / recipe.id, ignore_errors=True)
    if _uses_stored_checkpoints(recipe, store):
        with contextlib.suppress(OSError):
            checkpoint_sync.drop({recipe.id}, _cached_store(store, None))


def _open(context: WorkerContext) -> ArtifactStore:
    """The store. If it is remote, artifacts are copied to this machine, and the open store is kept: its client takes
    0.1 s to create."""
    if is_remote(context.store):
        return _cached_store(context.store, context.downloads)
    return open_store(context.store, context.downloads)


@functools.lru_cache(2)
def _cached_store(address: str, downloads: Path | None) -> ArtifactStore:
    return open_store(address, downloads)


def _advice_for_full_disk(context: WorkerContext) -> str:
    advice = "a disk is full: make room, then resume the study"
    if is_remote(context.store):
        return f"{advice}. {context.home} holds the local copies; cache_gb of the store's address limits their size"
    return f"{advice}. `slimfront store {context.store} --trim SIZE` removes artifacts that can be made again"


def _work(job: Job, context: WorkerContext) -> Outcome | RankDone:
    store = _open(context)
    records = ArtifactRecords(store)
    if ranks.here().first:  # if this rank finds no result, all ranks must take part
        existing = records.result(job)
        if existing is not None:
            if isinstance(existing, Success):
                return dataclasses.replace(existing, found=True)
            return existing
    if latest_notice() is not None:
        time.sleep(LEAVING_SECONDS)
        _stop_at_notice()
    inputs.bring(context.materials, store, context.home)
    with _scratch(context) as scratch:
        outcome = _attempt(job, context, store, Path(scratch))
    if not isinstance(outcome, Success):
        return outcome  # another attempt may succeed: only results are committed
    return records.commit_result(job, outcome)


def _scratch(context: WorkerContext) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder of this process. Folders of processes of this machine that no longer exist are removed."""
    context.scratch.mkdir(parents=True, exist_ok=True)
    machine = socket.gethostname()
    for folder in context.scratch.iterdir():
        parts = folder.name.split("~")
        if len(parts) == 3 and parts[0] == machine and not _process_exists(int(parts[1])):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{machine}~{os.getpid()}~", dir=context.scratch)


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@dataclass(frozen=True)
class _LocalArtifact:
    """An artifact of the store, and a folder of this machine that holds its files."""

    ref: ArtifactRef
    folder: Path
    output: JobOutput | None = None
    """The output of the job that made it; None if it was fetched."""


def _attempt(job: Job, context: WorkerContext, store: ArtifactStore, scratch: Path) -> Outcome | RankDone:
    """Fetch or make the artifact of a job's recipe, then measure it."""
    artifact = None
    if ranks.here().first:
        artifact = _fetched(job.recipe, store, scratch)
    if artifact is None:
        result = _make(job.recipe, context, store, scratch)
        if not isinstance(result, _LocalArtifact):
            _forget_after(result, job.recipe, context)
            return result
        artifact = result
    if artifact.output is not None and not job.meters:
        outcome: Outcome = _success(artifact, artifact.output)
    else:
        measured = _measure(job, context, store, artifact, scratch)
        if not isinstance(measured, JobOutput):
            _forget_after(measured, job.recipe, context)
            return measured
        outcome = _success(artifact, artifact.output or measured)
        outcome = dataclasses.replace(outcome, measurement=measured.measurement)
    _forget_after(outcome, job.recipe, context)
    return outcome


def _success(artifact: _LocalArtifact, output: JobOutput) -> Success:
    return Success(
        artifact.ref.digest, artifact.ref.size_bytes, output.measurement, output.seconds, output.saved_seconds
    )


def _forget_after(outcome: object, recipe: Recipe, context: WorkerContext) -> None:
    """Remove the checkpoints of a recipe if no attempt will follow this outcome."""
    is_final_failure = isinstance(outcome, Failure) and outcome.kind in ("invalid", "diverged")
    if is_final_failure or isinstance(outcome, Success | _LocalArtifact):
        forget_training(recipe, context.checkpoints, context.store)


def _make(
    recipe: Recipe, context: WorkerContext, store: ArtifactStore, scratch: Path
) -> _LocalArtifact | Failure | RankDone:
    """Make the artifact of a recipe. Ancestors that were removed from the store are made first, the oldest first."""
    ancestors, parent = _missing_ancestors(recipe, store, scratch)
    for ancestor in ancestors:
        result = _make_step(ancestor, parent, context, store, scratch)
        _forget_after(result, ancestor, context)
        if isinstance(result, Failure):
            return dataclasses.replace(
                result, message=f"{ancestor} could not be made again: {result.message}"
            )
        if isinstance(result, RankDone):
            if result.interrupted:
                return result
            result = _wait_for(ancestor, store, scratch)
        if parent is not None:
            shutil.rmtree(parent.folder, ignore_errors=True)
        parent = result
    return _make_step(recipe, parent, context, store, scratch)


def _missing_ancestors(
    recipe: Recipe, store: ArtifactStore, scratch: Path
) -> tuple[list[Recipe], _LocalArtifact | None]:
    """The ancestors without an artifact, the oldest first; and the artifact of the ancestor before them, fetched. None
    if they begin with the original."""
    missing: list[Recipe] = []
    ancestor = recipe.parent
    while ancestor is not None:
        artifact = _fetched(ancestor, store, scratch)
        if artifact is not None:
            return missing, artifact
        missing.insert(0, ancestor)
        ancestor = ancestor.parent
    return missing, None


def _wait_for(recipe: Recipe, store: ArtifactStore, scratch: Path) -> _LocalArtifact:
    """The artifact that the first rank is about to put."""
    while True:
        artifact = _fetched(recipe, store, scratch)
        if artifact is not None:
            return artifact
        time.sleep(_POLL_SECONDS)


def _make_step(
    recipe: Recipe,
    parent: _LocalArtifact | None,
    context: WorkerContext,
    store: ArtifactStore,
    scratch: Path,
) -> _LocalArtifact | Failure | RankDone:
    """Make the artifact of a recipe from its parent's, and put it into the store. It is put before it is measured, so
    that an interruption of the measurement does not lose it."""
    folder = scratch / f"made-{recipe.id}"
    output = _run_step(recipe, parent, context, folder)
    if not isinstance(output, JobOutput):
        return output
    ref = store.put(folder)
    committed = ArtifactRecords(store).commit(recipe, ref)
    if committed == ref:
        return _LocalArtifact(ref, folder, output)
    # Another attempt committed its copy of this model first, and the copies differ in their last bits: only the
    # committed copy is measured.
    shutil.rmtree(folder, ignore_errors=True)
    artifact = _fetched(recipe, store, scratch)
    if artifact is None:  # removed in the meantime
        return _make_step(recipe, parent, context, store, scratch)
    return artifact


def _run_step(
    recipe: Recipe, parent: _LocalArtifact | None, context: WorkerContext, folder: Path
) -> JobOutput | Failure | RankDone:
    """Make the model of a recipe in `folder`. A training resumes from the checkpoint of another attempt, whichever
    machine wrote it."""
    checkpoints = context.checkpoints / recipe.id
    sender = None
    if _uses_stored_checkpoints(recipe, context.store) and ranks.here().first:
        store = _cached_store(context.store, None)
        checkpoint_sync.fetch(recipe.id, store, checkpoints)
        sender = checkpoint_sync.CheckpointSender(recipe.id, store, checkpoints, folder.parent)
    parent_folder = None
    if parent is not None:
        parent_folder = parent.folder
    request = WorkRequest(
        Job(recipe, (), ""),
        context.materials,
        JobDirs(folder, context.cache, checkpoints),
        parent=parent_folder,
        sharing=context.sharing,
    )
    output = run.attempt(request, _reporting(sender))
    if sender is not None:
        if isinstance(output, Failure) and output.kind == "preempted":
            sender.send_now()
        else:
            sender.wait()
    return output


def _measure(
    job: Job, context: WorkerContext, store: ArtifactStore, artifact: _LocalArtifact, scratch: Path
) -> JobOutput | Failure | RankDone:
    request = WorkRequest(
        job,
        context.materials,
        JobDirs(scratch / "measured", context.cache),
        built=artifact.folder,
        previous=_previous_measurement(job, artifact.ref, store),
    )
    return run.attempt(request, _reporting(None))


def _previous_measurement(job: Job, ref: ArtifactRef, store: ArtifactStore) -> Measurement | None:
    """The measurement of `job.before` on this very artifact; None if there is none."""
    if job.before is None:
        return None
    outcome = ArtifactRecords(store).result(job.before)
    if isinstance(outcome, Success) and outcome.artifact == ref.digest:
        return outcome.measurement
    return None


def _fetched(recipe: Recipe, store: ArtifactStore, scratch: Path) -> _LocalArtifact | None:
    """The artifact of a recipe, fetched into a folder of `scratch`; None if the store has none."""
    ref = ArtifactRecords(store).find(recipe)
    if ref is None:
        return None
    folder = scratch / f"fetched-{recipe.id}"
    try:
        store.fetch(ref, folder)
    except LookupError:  # removed at this moment
        return None
    return _LocalArtifact(ref, folder)


def _reporting(sender: checkpoint_sync.CheckpointSender | None) -> Report:
    """A report that renews the lease of this process, stops the job at a termination notice, and sends checkpoints."""
    lease = Lease()

    def report(share: float, activity: str) -> None:
        lease.renew()
        _stop_at_notice()
        if sender is not None:
            sender()

    return report


def _stop_at_notice() -> None:
    notice = latest_notice()
    if notice is not None:
        raise JobInterruptedError(f"{notice.source} takes this machine away")


def _uses_stored_checkpoints(recipe: Recipe, store: str) -> bool:
    """Whether this recipe's checkpoints are put into the store. If the store is a folder, all machines see the study's
    folder of checkpoints anyway."""
    return is_remote(store) and bool(recipe.steps) and recipe.steps[-1].trains()
