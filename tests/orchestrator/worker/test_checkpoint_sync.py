"""Trainings that are interrupted on one machine and resume on another, without a shared disk."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.cloud import preemption
from cluster.cloud.preemption import Notice
from cluster.executors.inline import InlineExecutor
from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import open_store
from cluster.storage.store import ArtifactStore
from jobs import run
from jobs.job import Failure, Job, Success
from jobs.models import loading
from jobs.progress import Report
from jobs.recipe import Recipe
from jobs.techniques.distill import Distill
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing import store_usage
from orchestrator.service.launch import launch
from orchestrator.worker import checkpoint_sync
from orchestrator.worker import work as working
from orchestrator.worker.checkpoint_sync import (
    CheckpointSender,
    drop,
    fetch,
    send,
    steps_in,
    stored_checkpoints,
)
from orchestrator.worker.work import WorkerContext, forget_training, work

STEPS = 140


def write_checkpoint(folder: Path, steps: int, content: bytes = b"weights") -> Path:
    """Write the checkpoint files of a training after this many steps."""
    (folder / f"step-{steps}").mkdir(parents=True, exist_ok=True)
    (folder / f"step-{steps}" / "00000.safetensors").write_bytes(content)
    (folder / "checkpoint.json").write_text(json.dumps({"folder": f"step-{steps}", "losses": [1.0] * steps}))
    return folder


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("s3_address"))


def keys(store: ArtifactStore) -> list[str]:
    return list(store.records("checkpoints/"))


def test_the_checkpoint_with_the_most_steps_replaces_others(store: ArtifactStore, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    fetch("one", store, target)
    assert not target.exists()
    for steps in (50, 100, 50):  # a late checkpoint is not sent
        send("one", store, write_checkpoint(tmp_path / f"after-{steps}", steps))
    send("other", store, write_checkpoint(tmp_path / "after-50", 50, b"others"))
    assert keys(store) == ["checkpoints/one/00000100", "checkpoints/other/00000050"]
    assert len(store.holdings().artifacts) == 2
    write_checkpoint(target, 50)
    fetch("one", store, target)
    assert steps_in(target) == 100
    write_checkpoint(target, 150)
    fetch("one", store, target)
    assert steps_in(target) == 150
    drop({"one"}, store)
    assert keys(store) == ["checkpoints/other/00000050"]
    assert [artifact.ref.digest for artifact in store.holdings().artifacts] == [
        *stored_checkpoints(store).values()
    ]


def test_of_two_concurrent_attempts_the_one_with_more_steps_wins(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower attempt lists the checkpoints before the faster one sends its own."""
    put = type(store).put

    def put_after_another_send(self: ArtifactStore, folder: Path) -> object:
        with monkeypatch.context() as patched:
            patched.setattr(type(store), "put", put)
            send("one", store, write_checkpoint(tmp_path / "first", first_steps))
        return put(self, folder)  # type: ignore[arg-type]

    for first_steps, second_steps in ((100, 50), (200, 200)):
        with monkeypatch.context() as patched:
            patched.setattr(type(store), "put", put_after_another_send)
            send("one", store, write_checkpoint(tmp_path / "second", second_steps, b"another's"))
        assert keys(store) == [f"checkpoints/one/{first_steps:08}"]
        assert len(store.holdings().artifacts) == 1


def test_a_missing_checkpoint_is_not_resumed(store: ArtifactStore, tmp_path: Path) -> None:
    send("gone", store, write_checkpoint(tmp_path / "here", 50))
    store.remove(store.holdings().artifacts[0].ref)
    fetch("gone", store, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert keys(store) == ["checkpoints/gone/00000050"]
    drop({"gone"}, store)
    assert keys(store) == []


def test_a_damaged_checkpoint_is_removed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    send("one", store, write_checkpoint(tmp_path / "here", 50))
    (file,) = (tmp_path / "store" / "objects").rglob("step-50/*")
    file.chmod(0o644)
    file.write_bytes(b"changed")
    fetch("one", store, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert keys(store) == []
    assert store.holdings().artifacts == ()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "step-50" / "state.pt").write_bytes(b"a pickle"),
        lambda folder: (folder / "checkpoint.json").write_text('{"folder": "../..", "losses": []}'),
        lambda folder: (folder / "checkpoint.json").write_text('{"folder": "..", "losses": []}'),
        lambda folder: (folder / "checkpoint.json").write_text('{"folder": 1, "losses": []}'),
        lambda folder: (folder / "checkpoint.json").write_text('["step-50"]'),
        lambda folder: (folder / "checkpoint.json").write_text("{"),
        lambda folder: (folder / "checkpoint.json").rename(folder / "step-50" / "a.safetensors"),
        lambda folder: (folder / "step-50" / "00000.safetensors").unlink(),
    ],
)
def test_a_checkpoint_with_unexpected_files_is_not_resumed(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    folder = write_checkpoint(tmp_path / "here", 50)
    spoil(folder)
    store.commit("checkpoints/one/00000050", dataclasses.asdict(store.put(folder)))
    fetch("one", store, tmp_path / "there")
    assert [file.name for file in tmp_path.iterdir() if "there" in file.name] == []
    assert keys(store) == []
    assert store.holdings().artifacts == ()


def test_new_checkpoints_are_sent_at_intervals_during_training(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder, 9)  # from a killed attempt
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 3600.0)
    sender = CheckpointSender("one", store, folder, tmp_path)
    write_checkpoint(folder, 50)
    sender()
    sender.wait()
    assert keys(store) == []
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 0.0)
    sender()
    write_checkpoint(folder, 100)  # the training continues and removes the checkpoint that is being sent
    (folder / "step-50" / "00000.safetensors").unlink()
    sender.wait()
    assert keys(store) == ["checkpoints/one/00000050"]
    fetch("one", store, tmp_path / "there")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"checkpoint.json", "step-50"}
    sender.send_now()
    assert keys(store) == ["checkpoints/one/00000100"]
    assert not list(tmp_path.glob("sent-*"))


@pytest.fixture
def activities(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the activities that a training reports."""
    recorded: list[str] = []
    reporting = working._reporting

    def recording(sender: CheckpointSender | None) -> Report:
        report = reporting(sender)

        def record(share: float, activity: str) -> None:
            recorded.append(activity)
            report(share, activity)

        return record

    monkeypatch.setattr(working, "_reporting", recording)
    return recorded


def steps_of(activities: list[str]) -> list[str]:
    return [activity for activity in activities if activity.startswith("step ")]


@pytest.fixture
def preempt_when(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Gives this process a preemption notice as soon as a condition holds."""
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(working, "LEAVING_SECONDS", 0.01)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("SLIMFRONT_NOTICE", "")
    monkeypatch.delenv("SLIMFRONT_NOTICE")
    finished: list[bool] = []

    def preempt(condition: Callable[[], bool]) -> None:
        def poll() -> Notice | None:
            return Notice("a test") if condition() or finished else None

        preemption.watch([poll])

    yield preempt
    finished.append(True)


MachineFactory = Callable[[str], WorkerContext]


@pytest.fixture
def root(prepared: Callable[..., PreparedStudy]) -> Recipe:
    return prepared().plan.original


@pytest.fixture
def machine(prepared: Callable[..., PreparedStudy], s3_address: str, tmp_path: Path) -> MachineFactory:
    """Returns the worker context of a named machine, which shares only the bucket with other machines."""
    ready = prepared()

    def context(name: str) -> WorkerContext:
        return WorkerContext(
            ready.materials, s3_address, tmp_path / name / "scratch", tmp_path / name / "cache"
        )

    return context


def weights_of(outcome: object, store: str, folder: Path) -> dict[str, torch.Tensor]:
    assert isinstance(outcome, Success), outcome
    open_store(store).fetch(ArtifactRef(outcome.artifact, outcome.size_bytes), folder)
    return dict(loading.load(folder).module.state_dict())


def training(root: Recipe) -> Job:
    return Job(root.then(Distill(steps=STEPS, learning_rate=3e-3)), ("size",), "materials")


def test_a_training_resumes_on_another_machine_after_a_preemption(
    machine: MachineFactory,
    root: Recipe,
    activities: list[str],
    preempt_when: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    job, first, second = training(root), machine("first"), machine("second")
    store = open_store(first.store)
    assert isinstance(work(Job(root, (), "materials"), first), Success)
    preempt_when(lambda: len(steps_of(activities)) > 73)
    stopped = work(job, first)
    assert isinstance(stopped, Failure)
    assert (stopped.kind, stopped.message) == (
        "preempted",
        "JobInterruptedError: a test takes this machine away",
    )
    steps_before = steps_of(activities)
    assert 73 < len(steps_before) < STEPS
    (key,) = keys(store)
    assert key == f"checkpoints/{job.recipe.id}/{len(steps_before):08}"

    # A job sent to this machine after the notice is returned immediately.
    activities.clear()
    refused = work(job, first)
    assert isinstance(refused, Failure)
    assert refused.kind == "preempted"
    assert activities == []

    monkeypatch.delenv("SLIMFRONT_NOTICE")  # the next job runs on another machine
    resumed = work(job, second)
    steps_after = steps_of(activities)
    assert len(steps_after) == STEPS - len(steps_before)
    assert keys(store) == []
    assert not (tmp_path / "second" / "checkpoints" / job.recipe.id).exists()

    activities.clear()
    uninterrupted = dataclasses.replace(machine("third"), store=str(tmp_path / "alone"))
    assert isinstance(work(Job(root, (), "materials"), uninterrupted), Success)
    expected_weights = weights_of(work(job, uninterrupted), uninterrupted.store, tmp_path / "whole")
    assert steps_before + steps_after == steps_of(activities)
    for name, tensor in weights_of(resumed, first.store, tmp_path / "resumed").items():
        torch.testing.assert_close(expected_weights[name], tensor, rtol=1e-6, atol=0)


def test_a_machine_that_vanishes_without_notice_costs_little_training(
    machine: MachineFactory, root: Recipe, activities: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training(root)
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 0.0)
    assert isinstance(work(Job(root, (), "materials"), machine("first")), Success)
    save = run.loading.save

    def cut_off(*args: Any) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(run.loading, "save", cut_off)
    assert isinstance(work(job, machine("first")), Failure)
    monkeypatch.setattr(run.loading, "save", save)
    activities.clear()
    assert isinstance(work(job, machine("second")), Success)
    assert len(steps_of(activities)) in (STEPS - 50, STEPS - 100)


def test_a_model_whose_measurement_is_preempted_is_not_created_again(
    machine: MachineFactory,
    root: Recipe,
    activities: list[str],
    preempt_when: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(root, ("text",), "materials")
    preempt_when(lambda: "measuring" in activities)
    stop_at_notice = working._stop_at_notice

    def wait_for_notice() -> None:
        if activities.count("measuring") > 2:  # after this many batches
            while preemption.latest_notice() is None:
                time.sleep(0.005)
        stop_at_notice()

    monkeypatch.setattr(working, "_stop_at_notice", wait_for_notice)
    stopped = work(job, machine("first"))
    assert isinstance(stopped, Failure)
    assert stopped.kind == "preempted"
    monkeypatch.delenv("SLIMFRONT_NOTICE")
    monkeypatch.setattr(working, "_stop_at_notice", stop_at_notice)
    monkeypatch.setattr(run.loading, "save", lambda *args: pytest.fail("it was made again"))
    assert isinstance(work(job, machine("second")), Success)


def test_checkpoints_of_abandoned_trainings_are_removed_and_others_stay(
    prepared: Callable[..., PreparedStudy], s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(s3_address)
    ready = prepared(f"store={s3_address}", "search.candidates=1")
    abandoned = ready.plan.original.then(Distill(steps=10))
    for id in (ready.plan.original.id, abandoned.id, "others"):
        send(id, store, write_checkpoint(tmp_path / id, 50, id.encode()))
    forget_training(abandoned, tmp_path / "none", s3_address)
    assert {*stored_checkpoints(store)} == {ready.plan.original.id, "others"}
    launch(ready, lambda status: None, executor=InlineExecutor())
    assert {*stored_checkpoints(store)} == {"others"}


def test_old_checkpoints_are_reported_and_swept(
    s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_address)
    send("one", store, write_checkpoint(tmp_path / "one", 50))
    sizes = {item.kind: item.size_bytes for item in store_usage.inventory_at(s3_address).items}
    assert sizes["checkpoints"] > 0
    assert sizes["models"] == 0
    assert store_usage.sweep(s3_address) == 0
    assert {*stored_checkpoints(store)} == {"one"}
    monkeypatch.setattr(store_usage, "LEFTOVER_SECONDS", -60.0)
    assert store_usage.sweep(s3_address) == sizes["checkpoints"]
    assert stored_checkpoints(store) == {}
    assert store.holdings().artifacts == ()
