"""Work: what a job leaves on the worker's disk, and what it does where something is gone or no room is left."""

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


def test_checkpoints_are_kept_until_the_training_has_gone_well(
    prepared: Callable[..., PreparedStudy], tmp_path: Path
) -> None:
    ready = prepared()
    place = WorkerContext(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")
    root = ready.plan.original
    recipe = Recipe(root.origin, (Finetune(steps=60),))
    folder = tmp_path / "checkpoints" / recipe.id
    attempt, seen = run.attempt, []
    assert isinstance(work(Job(root, (), "materials"), place), Success)

    def watched(request: WorkRequest, report: Report) -> JobOutput | Failure | RankDone:
        made = attempt(request, report)
        seen.append([file.name for file in folder.iterdir()])
        return made

    try:
        run.attempt = watched
        assert isinstance(work(Job(recipe, (), "materials"), place), Success)
    finally:
        run.attempt = attempt
    (left,) = seen
    assert "checkpoint.json" in left
    assert not folder.exists()


@pytest.fixture
def place(prepared: Callable[..., PreparedStudy], tmp_path: Path) -> WorkerContext:
    ready = prepared()
    return WorkerContext(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")


@pytest.fixture
def root(prepared: Callable[..., PreparedStudy]) -> Recipe:
    return prepared().plan.original


def test_a_lineage_that_is_gone_is_made_again_and_nothing_is_left_of_it(
    place: WorkerContext, root: Recipe, tmp_path: Path
) -> None:
    recipe = Recipe(root.origin, (DropLayers(count=1), PruneFfn(ratio=0.2), Rtn(bits=4)))
    made = work(Job(recipe, ("text",), "materials"), place)
    assert isinstance(made, Success)
    store = LocalStore(Path(place.store))
    assert [key.partition("/")[2] for key in store.records("artifacts/")] == sorted(
        step.id for step in recipe.lineage()
    )
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_half_done_is_removed_and_what_another_is_at_stays(
    place: WorkerContext, root: Recipe
) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        gone = pool.apply(os.getpid)
    machine, alive = socket.gethostname(), os.getppid()
    names = [f"{machine}~{gone}~half", f"{machine}~{alive}~half", f"another-machine~{gone}~half", "unknown"]
    for name in names:
        (place.scratch / name).mkdir(parents=True)
        (place.scratch / name / "weights").write_bytes(b"x")
    assert isinstance(work(Job(root, (), "materials"), place), Success)
    assert sorted(left.name for left in place.scratch.iterdir()) == sorted(names[1:])


def test_a_record_that_names_what_is_gone_gives_way_to_what_was_made(
    place: WorkerContext, root: Recipe
) -> None:
    store = LocalStore(Path(place.store))
    store.commit(f"artifacts/{root.id}", {"digest": "0" * 64, "size_bytes": 1})
    made = work(Job(root, (), "materials"), place)
    assert isinstance(made, Success)
    assert store.record(f"artifacts/{root.id}") == {"digest": made.artifact, "size_bytes": made.size_bytes}
    assert store.has(ArtifactRef(made.artifact, made.size_bytes))


def test_a_committed_result_counts_though_its_artifact_is_gone(
    place: WorkerContext, root: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(Job(root, ("text",), "materials"), place)
    assert isinstance(made, Success)
    LocalStore(Path(place.store)).remove(ArtifactRef(made.artifact, made.size_bytes))
    monkeypatch.setattr(run, "attempt", lambda *given, **named: pytest.fail("it ran again"))
    assert work(Job(root, ("text",), "materials"), place) == dataclasses.replace(made, found=True)


def test_a_result_tells_what_statistics_spared_it(place: WorkerContext, root: Recipe) -> None:
    first, second = (
        work(Job(Recipe(root.origin, (PruneFfn(ratio=ratio),)), (), "materials"), place)
        for ratio in (0.2, 0.4)
    )
    assert isinstance(first, Success)
    assert isinstance(second, Success)
    assert first.saved_seconds == 0
    assert 0 < second.saved_seconds < first.seconds


def windows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows go through models from now on, batch by batch."""
    read, score = [], text.score

    def counted(runner: Runner, rows: Tensor) -> tuple[Tensor, Tensor]:
        read.append(len(rows))
        return score(runner, rows)

    monkeypatch.setattr(text, "score", counted)
    return read


def text_job(recipe: Recipe, fidelity: float, after: float = 0.0) -> Job:
    return Job(recipe, ("text", "size"), "materials", fidelity, after)


def measured(outcome: Outcome) -> Measurement:
    assert isinstance(outcome, Success)
    return dataclasses.replace(outcome.measurement, seconds=0.0)


@pytest.fixture
def at_once(prepared: Callable[..., PreparedStudy], root: Recipe, tmp_path: Path) -> Measurement:
    """What measuring all of the evaluation at once finds of the original, by another store."""
    elsewhere = WorkerContext(
        prepared().materials, str(tmp_path / "elsewhere"), tmp_path / "other", tmp_path / "cache"
    )
    return measured(work(text_job(root, 1.0), elsewhere))


def test_a_longer_measurement_goes_on_from_the_shorter_ones(
    place: WorkerContext, root: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 64)  # two windows
    read = windows_read(monkeypatch)
    work(text_job(root, 3 / 16), place)
    work(text_job(root, 8 / 16, after=3 / 16), place)
    found = measured(work(text_job(root, 1.0, after=8 / 16), place))
    assert read == [2, 1, 2, 2, 2, 2, 2, 2, 2]
    elsewhere = dataclasses.replace(place, store=str(tmp_path / "elsewhere"))
    assert found == measured(work(text_job(root, 1.0), elsewhere))


def test_where_the_shorter_measurement_is_not_there_all_is_read(
    place: WorkerContext, root: Recipe, at_once: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = windows_read(monkeypatch)
    work(dataclasses.replace(text_job(root, 1 / 4), meters=("text",)), place)  # another job
    assert measured(work(text_job(root, 1.0, after=1 / 4), place)) == at_once
    assert sum(read) == 4 + 16


def test_what_was_measured_of_another_copy_or_elsewhere_is_not_gone_on_from(
    place: WorkerContext, root: Recipe, at_once: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(Path(place.store))
    work(text_job(root, 1 / 4), place)
    key = f"results/{text_job(root, 1 / 4).id}"
    record = store.record(key)
    assert record is not None
    measurement = record["result"]["measurement"]
    other = {**record["result"], "artifact": "0" * 64}
    moved = {**measurement, "environment": {**measurement["environment"], "cpu": "another"}}
    for changed in (other, {**record["result"], "measurement": moved}):
        store.forget(key)
        store.commit(key, {**record, "result": changed})
        store.forget(f"results/{text_job(root, 1.0).id}")
        read = windows_read(monkeypatch)
        assert measured(work(text_job(root, 1.0, after=1 / 4), place)) == at_once
        assert sum(read) == 16


def test_what_was_seen_of_each_item_stays_in_the_store(place: WorkerContext, root: Recipe) -> None:
    job = text_job(root, 1.0)
    for _ in range(2):  # done, then found
        assert measured(work(job, place)).observed == {}
    record = LocalStore(Path(place.store)).record(f"results/{job.id}")
    assert record is not None
    assert len(record["result"]["measurement"]["observed"]["losses"]) == 16


def test_a_full_disk_is_told_with_the_cure(
    place: WorkerContext, root: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: LocalStore, folder: Path) -> ArtifactRef:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "put", full)
        failed = work(Job(root, (), "materials"), place)
    assert isinstance(failed, Failure)
    assert failed.kind == "disk_full"
    assert f"slimfront store {place.store} --trim" in failed.message
    assert isinstance(work(Job(root, (), "materials"), place), Success)


def test_a_gang_makes_a_model_and_what_is_gone_of_its_lineage_and_its_first_rank_alone_stores_it(
    place: WorkerContext, prepared: Callable[..., PreparedStudy]
) -> None:
    recipe = Recipe(prepared().plan.original.origin, (DropLayers(count=1), Finetune(steps=3, batch=2)))
    job = Job(recipe, ("size",), "materials")
    told = run_gang("a", work, (job, place), 2)
    assert isinstance(told.value, Success), told
    assert not told.value.found
    store = LocalStore(Path(place.store))
    assert store.record(f"artifacts/{recipe.id}") == {
        "digest": told.value.artifact,
        "size_bytes": told.value.size_bytes,
    }
    assert list(place.scratch.iterdir()) == []
    again = run_gang("a", work, (job, place), 2).value
    assert again == dataclasses.replace(told.value, found=True)


@pytest.mark.parametrize(
    ("rank", "raised", "kind"),
    [
        (1, MemoryError("no more"), "out_of_memory"),
        (1, JobInterruptedError("its node goes away"), "preempted"),
        (1, JobInterruptedError("another rank was interrupted", together=True), None),
        (0, JobInterruptedError("another rank was interrupted", together=True), "preempted"),
    ],
)
def test_what_a_rank_alone_meets_becomes_of_the_job_and_what_all_meet_the_first_tells(
    rank: int,
    raised: Exception,
    kind: str | None,
    place: WorkerContext,
    prepared: Callable[..., PreparedStudy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(prepared().plan.original.origin, (DropLayers(count=1),))

    def raising(*given: object) -> None:
        raise raised

    monkeypatch.setattr(run, "_compressed", raising)
    monkeypatch.setenv("RANK", str(rank))
    parent, made = Path(place.materials.model), place.scratch / "made"
    request = WorkRequest(
        Job(recipe, (), "materials"), place.materials, JobDirs(made, place.cache), parent=parent
    )
    outcome = run.attempt(request, lambda share, activity: None)
    if kind is None:
        assert outcome == RankDone(interrupted=True)
    else:
        assert isinstance(outcome, Failure)
        assert outcome.kind == kind
    assert not made.exists()


def test_ranks_but_the_first_leave_what_is_made_to_it(place: WorkerContext, prepared: Callable[..., PreparedStudy],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    job = Job(prepared().plan.original, (), "materials")
    assert work(job, place) is None
    assert LocalStore(Path(place.store)).record(f"artifacts/{job.recipe.id}") is None
