"""Jobs on a worker: files left on its disk, missing artifacts, reused measurements, full disks and gangs."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from cluster.executors.gang import run_gang
from cluster.storage.local_store import LocalStore
from cluster.storage.manifest import ArtifactRef
from jobs import run
from jobs.job import Failure, Job, Outcome, Success
from jobs.measurement.measurement import Measurement
from jobs.meters import text
from jobs.progress import JobInterruptedError, Report
from jobs.recipe import Recipe
from jobs.run import JobDirs, JobOutput, RankDone, WorkRequest
from jobs.runtimes import Runner
from jobs.techniques.drop_layers import DropLayers
from jobs.techniques.finetune import Finetune
from jobs.techniques.prune_ffn import PruneFfn
from jobs.techniques.rtn import Rtn
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.worker.work import WorkerContext, work


def test_checkpoints_are_kept_until_the_training_succeeds(
    prepared: Callable[..., PreparedStudy], tmp_path: Path
) -> None:
    ready = prepared()
    context = WorkerContext(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")
    root = ready.plan.original
    recipe = Recipe(root.origin, (Finetune(steps=60),))
    folder = tmp_path / "checkpoints" / recipe.id
    attempt, listings = run.attempt, []
    assert isinstance(work(Job(root, (), "materials"), context), Success)

    def list_checkpoints(request: WorkRequest, report: Report) -> JobOutput | Failure | RankDone:
        output = attempt(request, report)
        listings.append([file.name for file in folder.iterdir()])
        return output

    try:
        run.attempt = list_checkpoints
        assert isinstance(work(Job(recipe, (), "materials"), context), Success)
    finally:
        run.attempt = attempt
    (checkpoint_files,) = listings
    assert "checkpoint.json" in checkpoint_files
    assert not folder.exists()


@pytest.fixture
def context(prepared: Callable[..., PreparedStudy], tmp_path: Path) -> WorkerContext:
    ready = prepared()
    return WorkerContext(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")


@pytest.fixture
def root(prepared: Callable[..., PreparedStudy]) -> Recipe:
    return prepared().plan.original


def test_a_missing_lineage_is_recreated_and_leaves_no_scratch_files(
    context: WorkerContext, root: Recipe, tmp_path: Path
) -> None:
    recipe = Recipe(root.origin, (DropLayers(count=1), PruneFfn(ratio=0.2), Rtn(bits=4)))
    outcome = work(Job(recipe, ("text",), "materials"), context)
    assert isinstance(outcome, Success)
    store = LocalStore(Path(context.store))
    assert [key.partition("/")[2] for key in store.records("artifacts/")] == sorted(
        step.id for step in recipe.lineage()
    )
    assert list((tmp_path / "scratch").iterdir()) == []


def test_scratch_files_of_killed_processes_are_removed_and_those_of_others_stay(
    context: WorkerContext, root: Recipe
) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        dead_pid = pool.apply(os.getpid)
    hostname, live_pid = socket.gethostname(), os.getppid()
    names = [
        f"{hostname}~{dead_pid}~half",
        f"{hostname}~{live_pid}~half",
        f"another-machine~{dead_pid}~half",
        "unknown",
    ]
    for name in names:
        (context.scratch / name).mkdir(parents=True)
        (context.scratch / name / "weights").write_bytes(b"x")
    assert isinstance(work(Job(root, (), "materials"), context), Success)
    assert sorted(folder.name for folder in context.scratch.iterdir()) == sorted(names[1:])


def test_a_record_of_a_missing_artifact_is_replaced_by_the_new_artifact(
    context: WorkerContext, root: Recipe
) -> None:
    store = LocalStore(Path(context.store))
    store.commit(f"artifacts/{root.id}", {"digest": "0" * 64, "size_bytes": 1})
    outcome = work(Job(root, (), "materials"), context)
    assert isinstance(outcome, Success)
    assert store.record(f"artifacts/{root.id}") == {
        "digest": outcome.artifact,
        "size_bytes": outcome.size_bytes,
    }
    assert store.has(ArtifactRef(outcome.artifact, outcome.size_bytes))


def test_a_committed_result_is_valid_even_if_its_artifact_is_missing(
    context: WorkerContext, root: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = work(Job(root, ("text",), "materials"), context)
    assert isinstance(outcome, Success)
    LocalStore(Path(context.store)).remove(ArtifactRef(outcome.artifact, outcome.size_bytes))
    monkeypatch.setattr(run, "attempt", lambda *args, **kwargs: pytest.fail("it ran again"))
    assert work(Job(root, ("text",), "materials"), context) == dataclasses.replace(outcome, found=True)


def test_a_result_reports_the_seconds_that_statistics_saved(context: WorkerContext, root: Recipe) -> None:
    first, second = (
        work(Job(Recipe(root.origin, (PruneFfn(ratio=ratio),)), (), "materials"), context)
        for ratio in (0.2, 0.4)
    )
    assert isinstance(first, Success)
    assert isinstance(second, Success)
    assert first.saved_seconds == 0
    assert 0 < second.saved_seconds < first.seconds


def windows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of windows of each batch that models evaluate from now on."""
    batch_sizes, score = [], text.score

    def count_windows(runner: Runner, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch_sizes.append(len(rows))
        return score(runner, rows)

    monkeypatch.setattr(text, "score", count_windows)
    return batch_sizes


def text_job(recipe: Recipe, fidelity: float, after: float = 0.0) -> Job:
    return Job(recipe, ("text", "size"), "materials", fidelity, after)


def measured(outcome: Outcome) -> Measurement:
    assert isinstance(outcome, Success)
    return dataclasses.replace(outcome.measurement, seconds=0.0)


@pytest.fixture
def full_measurement(prepared: Callable[..., PreparedStudy], root: Recipe, tmp_path: Path) -> Measurement:
    """Return the measurement of the original on the full evaluation in a single job, with another store."""
    other_context = WorkerContext(
        prepared().materials, str(tmp_path / "elsewhere"), tmp_path / "other", tmp_path / "cache"
    )
    return measured(work(text_job(root, 1.0), other_context))


def test_a_longer_measurement_continues_from_shorter_ones(
    context: WorkerContext, root: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 64)  # two windows
    batch_sizes = windows_read(monkeypatch)
    work(text_job(root, 3 / 16), context)
    work(text_job(root, 8 / 16, after=3 / 16), context)
    continued = measured(work(text_job(root, 1.0, after=8 / 16), context))
    assert batch_sizes == [2, 1, 2, 2, 2, 2, 2, 2, 2]
    other_context = dataclasses.replace(context, store=str(tmp_path / "elsewhere"))
    assert continued == measured(work(text_job(root, 1.0), other_context))


def test_without_the_shorter_measurement_the_full_evaluation_is_read(
    context: WorkerContext, root: Recipe, full_measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_sizes = windows_read(monkeypatch)
    work(dataclasses.replace(text_job(root, 1 / 4), meters=("text",)), context)  # a different job
    assert measured(work(text_job(root, 1.0, after=1 / 4), context)) == full_measurement
    assert sum(batch_sizes) == 4 + 16


def test_a_measurement_of_another_artifact_or_environment_is_not_continued(
    context: WorkerContext, root: Recipe, full_measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(Path(context.store))
    work(text_job(root, 1 / 4), context)
    key = f"results/{text_job(root, 1 / 4).id}"
    record = store.record(key)
    assert record is not None
    measurement = record["result"]["measurement"]
    other_artifact = {**record["result"], "artifact": "0" * 64}
    other_environment = {**measurement, "environment": {**measurement["environment"], "cpu": "another"}}
    for changed_result in (other_artifact, {**record["result"], "measurement": other_environment}):
        store.forget(key)
        store.commit(key, {**record, "result": changed_result})
        store.forget(f"results/{text_job(root, 1.0).id}")
        batch_sizes = windows_read(monkeypatch)
        assert measured(work(text_job(root, 1.0, after=1 / 4), context)) == full_measurement
        assert sum(batch_sizes) == 16


def test_observations_of_items_stay_in_the_store(context: WorkerContext, root: Recipe) -> None:
    job = text_job(root, 1.0)
    for _ in range(2):  # executed, then found in the store
        assert measured(work(job, context)).observed == {}
    record = LocalStore(Path(context.store)).record(f"results/{job.id}")
    assert record is not None
    assert len(record["result"]["measurement"]["observed"]["losses"]) == 16


def test_a_full_disk_is_reported_with_a_remedy(
    context: WorkerContext, root: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(store: LocalStore, folder: Path) -> ArtifactRef:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "put", raise_disk_full)
        outcome = work(Job(root, (), "materials"), context)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "disk_full"
    assert f"slimfront store {context.store} --trim" in outcome.message
    assert isinstance(work(Job(root, (), "materials"), context), Success)


def test_a_gang_creates_a_model_with_its_missing_lineage_and_only_its_first_rank_stores_it(
    context: WorkerContext, prepared: Callable[..., PreparedStudy]
) -> None:
    recipe = Recipe(prepared().plan.original.origin, (DropLayers(count=1), Finetune(steps=3, batch=2)))
    job = Job(recipe, ("size",), "materials")
    gang_result = run_gang("a", work, (job, context), 2)
    assert isinstance(gang_result.value, Success), gang_result
    assert not gang_result.value.found
    store = LocalStore(Path(context.store))
    assert store.record(f"artifacts/{recipe.id}") == {
        "digest": gang_result.value.artifact,
        "size_bytes": gang_result.value.size_bytes,
    }
    assert list(context.scratch.iterdir()) == []
    repeated = run_gang("a", work, (job, context), 2).value
    assert repeated == dataclasses.replace(gang_result.value, found=True)


@pytest.mark.parametrize(
    ("rank", "error", "kind"),
    [
        (1, MemoryError("no more"), "out_of_memory"),
        (1, JobInterruptedError("its node goes away"), "preempted"),
        (1, JobInterruptedError("another rank was interrupted", on_all_ranks=True), None),
        (0, JobInterruptedError("another rank was interrupted", on_all_ranks=True), "preempted"),
    ],
)
def test_an_error_of_one_rank_fails_the_job_and_an_error_of_all_ranks_is_reported_by_the_first(
    rank: int,
    error: Exception,
    kind: str | None,
    context: WorkerContext,
    prepared: Callable[..., PreparedStudy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(prepared().plan.original.origin, (DropLayers(count=1),))

    def raise_error(*args: object) -> None:
        raise error

    monkeypatch.setattr(run, "_compressed", raise_error)
    monkeypatch.setenv("RANK", str(rank))
    parent, output_folder = Path(context.materials.model), context.scratch / "made"
    request = WorkRequest(
        Job(recipe, (), "materials"), context.materials, JobDirs(output_folder, context.cache), parent=parent
    )
    outcome = run.attempt(request, lambda share, activity: None)
    if kind is None:
        assert outcome == RankDone(interrupted=True)
    else:
        assert isinstance(outcome, Failure)
        assert outcome.kind == kind
    assert not output_folder.exists()


def test_only_the_first_rank_stores_the_model(context: WorkerContext, prepared: Callable[..., PreparedStudy],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    job = Job(prepared().plan.original, (), "materials")
    assert work(job, context) is None
    assert LocalStore(Path(context.store)).record(f"artifacts/{job.recipe.id}") is None
