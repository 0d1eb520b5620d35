"""Work: what a job leaves on the worker's disk, and what it does where something is gone or no room is left."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.store import ArtifactRef, LocalStore
from jobs import run
from jobs.job import Failure, Job, Success
from jobs.recipe import Recipe
from jobs.techniques.drop_layers import DropLayers
from jobs.techniques.finetune import Finetune
from jobs.techniques.prune_ffn import PruneFfn
from jobs.techniques.rtn import Rtn
from orchestrator.prepare import Prepared
from orchestrator.work import Workplace, work


def test_checkpoints_are_kept_until_the_training_has_gone_well(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    ready = prepared()
    place = Workplace(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")
    root = ready.plan.original
    recipe = Recipe(root.origin, (Finetune(steps=60),))
    folder = tmp_path / "checkpoints" / recipe.id
    attempt, seen = run.attempt, []
    assert isinstance(work(Job(root, (), "materials"), place), Success)

    def watched(*given: object, **named: object) -> object:
        made = attempt(*given, **named)  # type: ignore[arg-type]
        seen.append([file.name for file in folder.iterdir()])
        return made

    try:
        run.attempt = watched  # type: ignore[assignment]
        assert isinstance(work(Job(recipe, (), "materials"), place), Success)
    finally:
        run.attempt = attempt
    (left,) = seen
    assert "checkpoint.json" in left
    assert not folder.exists()


@pytest.fixture
def place(prepared: Callable[..., Prepared], tmp_path: Path) -> Workplace:
    ready = prepared()
    return Workplace(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")


@pytest.fixture
def root(prepared: Callable[..., Prepared]) -> Recipe:
    return prepared().plan.original


def test_a_lineage_that_is_gone_is_made_again_and_nothing_is_left_of_it(
    place: Workplace, root: Recipe, tmp_path: Path
) -> None:
    recipe = Recipe(root.origin, (DropLayers(count=1), PruneFfn(ratio=0.2), Rtn(bits=4)))
    made = work(Job(recipe, ("text",), "materials"), place)
    assert isinstance(made, Success)
    store = LocalStore(Path(place.store))
    assert [key.partition("/")[2] for key in store.records("artifacts/")] == sorted(
        step.id for step in recipe.lineage()
    )
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_record_that_names_what_is_gone_gives_way_to_what_was_made(place: Workplace, root: Recipe) -> None:
    store = LocalStore(Path(place.store))
    store.commit(f"artifacts/{root.id}", {"digest": "0" * 64, "size_bytes": 1})
    made = work(Job(root, (), "materials"), place)
    assert isinstance(made, Success)
    assert store.record(f"artifacts/{root.id}") == {"digest": made.artifact, "size_bytes": made.size_bytes}
    assert store.has(ArtifactRef(made.artifact, made.size_bytes))


def test_a_committed_result_counts_though_its_artifact_is_gone(
    place: Workplace, root: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(Job(root, ("text",), "materials"), place)
    assert isinstance(made, Success)
    LocalStore(Path(place.store)).remove(ArtifactRef(made.artifact, made.size_bytes))
    monkeypatch.setattr(run, "attempt", lambda *given, **named: pytest.fail("it ran again"))
    assert work(Job(root, ("text",), "materials"), place) == dataclasses.replace(made, found=True)


def test_a_result_tells_what_statistics_spared_it(place: Workplace, root: Recipe) -> None:
    first, second = (
        work(Job(Recipe(root.origin, (PruneFfn(ratio=ratio),)), (), "materials"), place)
        for ratio in (0.2, 0.4)
    )
    assert isinstance(first, Success)
    assert isinstance(second, Success)
    assert first.spared_seconds == 0
    assert 0 < second.spared_seconds < first.seconds


def test_a_full_disk_is_told_with_the_cure(
    place: Workplace, root: Recipe, monkeypatch: pytest.MonkeyPatch
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
