"""Trainings that are interrupted on one machine and go on on another, which shares no disk with it."""

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


def lay(folder: Path, steps: int, content: bytes = b"weights") -> Path:
    """What a training leaves after so many steps."""
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


def test_the_furthest_checkpoint_counts_and_takes_the_place_of_others(
    store: ArtifactStore, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    fetch("one", store, elsewhere)
    assert not elsewhere.exists()
    for steps in (50, 100, 50):  # a late one is not sent
        send("one", store, lay(tmp_path / f"after-{steps}", steps))
    send("other", store, lay(tmp_path / "after-50", 50, b"others"))
    assert keys(store) == ["checkpoints/one/00000100", "checkpoints/other/00000050"]
    assert len(store.holdings().artifacts) == 2
    lay(elsewhere, 50)
    fetch("one", store, elsewhere)
    assert steps_in(elsewhere) == 100
    lay(elsewhere, 150)
    fetch("one", store, elsewhere)
    assert steps_in(elsewhere) == 150
    drop({"one"}, store)
    assert keys(store) == ["checkpoints/other/00000050"]
    assert [one.ref.digest for one in store.holdings().artifacts] == [*stored_checkpoints(store).values()]


def test_of_two_attempts_that_send_at_once_the_furthest_stays(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one has looked before the other sent."""
    put = type(store).put

    def later(self: ArtifactStore, folder: Path) -> object:
        with monkeypatch.context() as patched:
            patched.setattr(type(store), "put", put)
            send("one", store, lay(tmp_path / "first", first))
        return put(self, folder)  # type: ignore[arg-type]

    for first, second in ((100, 50), (200, 200)):
        with monkeypatch.context() as patched:
            patched.setattr(type(store), "put", later)
            send("one", store, lay(tmp_path / "second", second, b"another's"))
        assert keys(store) == [f"checkpoints/one/{first:08}"]
        assert len(store.holdings().artifacts) == 1


def test_a_checkpoint_that_is_gone_or_damaged_is_not_gone_on_from(
    store: ArtifactStore, tmp_path: Path
) -> None:
    send("gone", store, lay(tmp_path / "here", 50))
    store.remove(store.holdings().artifacts[0].ref)
    fetch("gone", store, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert keys(store) == ["checkpoints/gone/00000050"]
    drop({"gone"}, store)
    assert keys(store) == []


def test_a_damaged_checkpoint_is_removed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    send("one", store, lay(tmp_path / "here", 50))
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
def test_what_no_training_wrote_is_not_gone_on_from(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    folder = lay(tmp_path / "here", 50)
    spoil(folder)
    store.commit("checkpoints/one/00000050", dataclasses.asdict(store.put(folder)))
    fetch("one", store, tmp_path / "there")
    assert [file.name for file in tmp_path.iterdir() if "there" in file.name] == []
    assert keys(store) == []
    assert store.holdings().artifacts == ()


def test_while_training_goes_on_a_new_checkpoint_is_sent_now_and_then(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    lay(folder, 9)  # a killed attempt left it
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 3600.0)
    sender = CheckpointSender("one", store, folder, tmp_path)
    lay(folder, 50)
    sender()
    sender.wait()
    assert keys(store) == []
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 0.0)
    sender()
    lay(folder, 100)  # the training goes on, and removes what is being sent
    (folder / "step-50" / "00000.safetensors").unlink()
    sender.wait()
    assert keys(store) == ["checkpoints/one/00000050"]
    fetch("one", store, tmp_path / "there")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"checkpoint.json", "step-50"}
    sender.send_now()
    assert keys(store) == ["checkpoints/one/00000100"]
    assert not list(tmp_path.glob("sent-*"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What training reports, step by step."""
    told: list[str] = []
    reporting = working._reporting

    def watched(sender: CheckpointSender | None) -> Report:
        report = reporting(sender)

        def watch(share: float, what: str) -> None:
            told.append(what)
            report(share, what)

        return watch

    monkeypatch.setattr(working, "_reporting", watched)
    return told


def steps_of(seen: list[str]) -> list[str]:
    return [what for what in seen if what.startswith("step ")]


@pytest.fixture
def take_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Gives this process notice as soon as something holds."""
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(working, "LEAVING_SECONDS", 0.01)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("SLIMFRONT_NOTICE", "")
    monkeypatch.delenv("SLIMFRONT_NOTICE")
    over: list[bool] = []

    def take_away(when: Callable[[], bool]) -> None:
        preemption.watch([lambda: Notice("a test") if when() or over else None])

    yield take_away
    over.append(True)


Place = Callable[[str], WorkerContext]


@pytest.fixture
def root(prepared: Callable[..., PreparedStudy]) -> Recipe:
    return prepared().plan.original


@pytest.fixture
def machine(prepared: Callable[..., PreparedStudy], s3_address: str, tmp_path: Path) -> Place:
    """A machine of this name, which shares the bucket alone with others."""
    ready = prepared()

    def place(name: str) -> WorkerContext:
        return WorkerContext(
            ready.materials, s3_address, tmp_path / name / "scratch", tmp_path / name / "cache"
        )

    return place


def weights_of(made: object, store: str, folder: Path) -> dict[str, torch.Tensor]:
    assert isinstance(made, Success), made
    open_store(store).fetch(ArtifactRef(made.artifact, made.size_bytes), folder)
    return dict(loading.load(folder).module.state_dict())


def training(root: Recipe) -> Job:
    return Job(root.then(Distill(steps=STEPS, learning_rate=3e-3)), ("size",), "materials")


def test_a_training_goes_on_elsewhere_when_its_machine_is_taken_away(
    machine: Place,
    root: Recipe,
    seen: list[str],
    take_away: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    job, first, second = training(root), machine("first"), machine("second")
    store = open_store(first.store)
    assert isinstance(work(Job(root, (), "materials"), first), Success)
    take_away(lambda: len(steps_of(seen)) > 73)
    stopped = work(job, first)
    assert isinstance(stopped, Failure)
    assert (stopped.kind, stopped.message) == (
        "preempted",
        "JobInterruptedError: a test takes this machine away",
    )
    before = steps_of(seen)
    assert 73 < len(before) < STEPS
    (key,) = keys(store)
    assert key == f"checkpoints/{job.recipe.id}/{len(before):08}"

    # What is handed to this machine by who has not heard of it comes back at once.
    seen.clear()
    again = work(job, first)
    assert isinstance(again, Failure)
    assert again.kind == "preempted"
    assert seen == []

    monkeypatch.delenv("SLIMFRONT_NOTICE")  # another machine
    resumed = work(job, second)
    after = steps_of(seen)
    assert len(after) == STEPS - len(before)
    assert keys(store) == []
    assert not (tmp_path / "second" / "checkpoints" / job.recipe.id).exists()

    seen.clear()
    alone = dataclasses.replace(machine("third"), store=str(tmp_path / "alone"))
    assert isinstance(work(Job(root, (), "materials"), alone), Success)
    whole = weights_of(work(job, alone), alone.store, tmp_path / "whole")
    assert before + after == steps_of(seen)
    for name, tensor in weights_of(resumed, first.store, tmp_path / "resumed").items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-6, atol=0)


def test_a_machine_that_vanishes_without_notice_costs_little_training(
    machine: Place, root: Recipe, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training(root)
    monkeypatch.setattr(checkpoint_sync, "SEND_SECONDS", 0.0)
    assert isinstance(work(Job(root, (), "materials"), machine("first")), Success)
    save = run.loading.save

    def cut_off(*given: Any) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(run.loading, "save", cut_off)
    assert isinstance(work(job, machine("first")), Failure)
    monkeypatch.setattr(run.loading, "save", save)
    seen.clear()
    assert isinstance(work(job, machine("second")), Success)
    assert len(steps_of(seen)) in (STEPS - 50, STEPS - 100)


def test_a_model_that_was_made_is_only_measured_when_its_machine_is_taken_away_meanwhile(
    machine: Place,
    root: Recipe,
    seen: list[str],
    take_away: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(root, ("text",), "materials")
    take_away(lambda: "measuring" in seen)
    answer = working._stop_at_notice

    def slowly() -> None:
        if seen.count("measuring") > 2:  # so many batches went through it
            while preemption.latest_notice() is None:
                time.sleep(0.005)
        answer()

    monkeypatch.setattr(working, "_stop_at_notice", slowly)
    stopped = work(job, machine("first"))
    assert isinstance(stopped, Failure)
    assert stopped.kind == "preempted"
    monkeypatch.delenv("SLIMFRONT_NOTICE")
    monkeypatch.setattr(working, "_stop_at_notice", answer)
    monkeypatch.setattr(run.loading, "save", lambda *given: pytest.fail("it was made again"))
    assert isinstance(work(job, machine("second")), Success)


def test_checkpoints_of_what_was_given_up_go_and_those_of_others_stay(
    prepared: Callable[..., PreparedStudy], s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(s3_address)
    ready = prepared(f"store={s3_address}", "search.candidates=1")
    given_up = ready.plan.original.then(Distill(steps=10))
    for id in (ready.plan.original.id, given_up.id, "others"):
        send(id, store, lay(tmp_path / id, 50, id.encode()))
    forget_training(given_up, tmp_path / "none", s3_address)
    assert {*stored_checkpoints(store)} == {ready.plan.original.id, "others"}
    launch(ready, lambda status: None, executor=InlineExecutor())
    assert {*stored_checkpoints(store)} == {"others"}


def test_old_checkpoints_are_told_and_swept(
    s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_address)
    send("one", store, lay(tmp_path / "one", 50))
    sizes = {item.kind: item.size_bytes for item in store_usage.inventory_at(s3_address).items}
    assert sizes["checkpoints"] > 0
    assert sizes["models"] == 0
    assert store_usage.sweep(s3_address) == 0
    assert {*stored_checkpoints(store)} == {"one"}
    monkeypatch.setattr(store_usage, "LEFTOVER_SECONDS", -60.0)
    assert store_usage.sweep(s3_address) == sizes["checkpoints"]
    assert stored_checkpoints(store) == {}
    assert store.holdings().artifacts == ()
