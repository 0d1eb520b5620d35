"""A store that is trimmed to what has to stay: results count still, and what is needed again is made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.executors.inline import InlineExecutor
from cluster.storage.local_store import LocalStore
from cluster.storage.open import open_store
from jobs import run
from jobs.job import Job, Outcome
from jobs.progress import Report
from orchestrator.config.load import load
from orchestrator.persistence.lock import only_one
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing.export import export_member
from orchestrator.publishing.store_usage import Inventory, Item, inventory, parse_size, remove
from orchestrator.service.launch import launch
from orchestrator.study.results import Results
from orchestrator.worker.work import WorkerContext, work


@pytest.fixture
def prepared(study_file: Path) -> Callable[..., PreparedStudy]:
    """Prepares the tiny study with overrides; its choices are of several steps from the start, and all different."""
    return lambda *overrides: prepare(load(study_file, ("search.algorithm=random", *overrides)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were really done, in their order."""
    found: list[Job] = []
    attempt = run.attempt

    def noted(request: run.WorkRequest, report: Report) -> object:
        found.append(request.job)
        return attempt(request, report)

    monkeypatch.setattr(run, "attempt", noted)
    return found


def run_inline(ready: PreparedStudy) -> Results:
    root = Path(ready.config.store)
    place = WorkerContext(ready.materials, str(root), ready.folder.scratch, root / "cache")

    def do(job: Job) -> Outcome:
        return work(job, place)

    return launch(ready, lambda status: None, executor=InlineExecutor(), do=do)


def trimmed(root: Path, limit_bytes: int = 0) -> list[Item]:
    return remove(inventory(root).to_evict(limit_bytes))


def kinds(held: Inventory) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in held.items:
        if item.size_bytes:
            found[item.kind] = found.get(item.kind, 0) + item.number
    return found


SPACE = "space={depth: {drop_layers: {count: 1}}, bits: {gptq: {bits: [3, 4, 8]}}}"
"""Every candidate has the same intermediate, or none, and its statistics."""


def test_all_that_a_store_holds_is_told_by_what_it_is(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    results = run_inline(ready)
    root = Path(ready.config.store)
    (ready.folder.checkpoints / "0123").mkdir(parents=True)
    (ready.folder.checkpoints / "0123" / "state").write_bytes(b"x" * 1000)
    held = inventory(root)
    found = kinds(held)
    assert found["originals"] == 1
    assert found["fronts"] == len([id for id in results.members if id != results.original.id])
    assert found["originals"] + found["fronts"] + found["candidates"] == 6
    assert found["intermediates"] >= 1
    assert found["checkpoints"] == 1
    assert found["records"] == sum(1 for _ in (root / "records").rglob("*.json"))
    assert [study.name for study in held.studies] == ["tiny"]
    on_disk = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert held.size_bytes == on_disk


def test_a_trimmed_store_keeps_fronts_originals_and_results_and_a_study_goes_on(
    prepared: Callable[..., PreparedStudy], made: list[Job], tmp_path: Path
) -> None:
    ready = prepared("search.candidates=4")
    before = run_inline(ready)
    root = Path(ready.config.store)
    gone = trimmed(root)
    assert {item.kind for item in gone} >= {"intermediates", "candidates"}
    assert set(kinds(inventory(root))) == {"originals", "fronts", "records", "files"}
    made.clear()

    assert run_inline(ready).members == before.members
    assert made == []
    export_member(ready.folder.path, "smallest", tmp_path / "out")
    assert made == []

    results = run_inline(prepared("search.candidates=8"))
    assert [c.state for c in results.candidates] == ["measured"] * 9
    counted = [job for job in made if job.meters]
    assert len(counted) == 4  # those that are new
    assert all(
        old.measurement == new.measurement
        for old, new in zip(before.candidates, results.candidates, strict=False)
    )


def test_a_removed_parent_is_made_again_for_its_child_and_is_the_same(
    prepared: Callable[..., PreparedStudy], made: list[Job]
) -> None:
    ready = prepared(SPACE, "search.candidates=2")
    run_inline(ready)
    root = Path(ready.config.store)
    store = open_store(ready.config.store)
    names = {key: store.record(key) for key in store.records("artifacts/")}
    trimmed(root)
    left = set(store.records("artifacts/"))
    assert left < set(names)
    made.clear()
    run_inline(prepared(SPACE, "search.candidates=6"))
    again = [job for job in made if f"artifacts/{job.recipe.id}" in names]
    assert [str(job.recipe) for job in again] == ["drop_layers(count=1)"]
    for key in store.records("artifacts/"):
        assert names.get(key) in (None, store.record(key))


def test_what_was_removed_by_hand_is_made_again_though_its_record_is_left(
    prepared: Callable[..., PreparedStudy], tmp_path: Path, made: list[Job]
) -> None:
    ready = prepared(
        SPACE, "search.candidates=7"
    )  # all there are: the smallest, on the front, takes two steps
    results = run_inline(ready)
    store = open_store(ready.config.store)
    for held in store.holdings().artifacts:
        store.remove(held.ref)
    made.clear()
    member = next(c for c in results.candidates if c.id in results.members and len(c.recipe.steps) == 2)
    export_member(ready.folder.path, member.id, tmp_path / "out")
    assert [job.recipe for job in made] == member.recipe.lineage()
    assert "made again" not in (tmp_path / "out" / "README.md").read_text()
    assert {held.ref.digest for held in store.holdings().artifacts} >= {member.artifact}


def test_an_export_tells_that_its_files_are_not_those_that_were_measured(
    prepared: Callable[..., PreparedStudy], tmp_path: Path
) -> None:
    ready = prepared("search.candidates=1")
    run_inline(ready)
    front = json.loads(ready.folder.front.read_text())
    for member in front["members"]:
        member["artifact"] = "0" * 64
    ready.folder.front.write_text(json.dumps(front))
    export_member(ready.folder.path, "smallest", tmp_path / "out")
    assert "these were made again" in (tmp_path / "out" / "README.md").read_text()


def test_the_least_worth_goes_first_and_no_more_than_has_to(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared(SPACE, "search.candidates=3")
    run_inline(ready)
    root = Path(ready.config.store)
    (ready.folder.scratch / "left").mkdir(parents=True)
    (ready.folder.scratch / "left" / "half").write_bytes(b"x" * 1000)
    held = inventory(root)
    order = [item.kind for item in held.to_evict(0)]
    assert order[0] == "scratch"
    assert order == sorted(
        order, key=["scratch", "statistics", "graphs", "intermediates", "candidates"].index
    )
    assert held.to_evict(held.size_bytes) == []
    assert [item.kind for item in held.to_evict(held.size_bytes - 1)] == ["scratch"]
    statistics = [item for item in held.items if item.kind == "statistics"]
    assert statistics
    for file in (root / "cache").glob(f"{statistics[-1].name}.*"):
        os.utime(file, (1000, 1000))
    assert [item.name for item in inventory(root).to_evict(held.size_bytes - 1001)][1] == statistics[-1].name


def test_what_a_running_study_may_need_stays(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared(SPACE, "search.candidates=3")
    results = run_inline(ready)
    run_inline(prepared("name=other", "search.candidates=3"))
    root = Path(ready.config.store)
    ready.folder.scratch.mkdir(exist_ok=True)
    (ready.folder.scratch / "half").write_bytes(b"x")
    store = open_store(ready.config.store)
    before = set(store.records("artifacts/"))
    with only_one(ready.folder.path):
        gone = trimmed(root)
        assert {item.kind for item in gone} == {"intermediates", "candidates", "statistics"}
        assert (ready.folder.scratch / "half").exists()
        lineages = [candidate.recipe.lineage() for candidate in results.candidates]
        mine = {step.id for lineage in lineages for step in lineage}
        assert {f"artifacts/{id}" for id in mine} <= set(store.records("artifacts/")) < before
        assert list((root / "cache").glob(f"{results.original.id}-*"))


def test_scratch_of_a_study_that_starts_at_this_moment_stays(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("search.candidates=1")
    run_inline(ready)
    ready.folder.scratch.mkdir(exist_ok=True)
    (ready.folder.scratch / "half").write_bytes(b"x")
    found = [item for item in inventory(Path(ready.config.store)).items if item.kind == "scratch"]
    with only_one(ready.folder.path):
        assert remove(found) == []
    assert (ready.folder.scratch / "half").exists()
    assert remove(found) == found
    assert not ready.folder.scratch.exists()


def test_a_trim_killed_between_record_and_artifact_leaves_a_sound_store(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(SPACE, "search.candidates=2")
    run_inline(ready)
    root = Path(ready.config.store)

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            trimmed(root)
    assert kinds(inventory(root))["unnamed"] == 1
    results = run_inline(prepared(SPACE, "search.candidates=4"))
    assert [c.state for c in results.candidates] == ["measured"] * 5
    trimmed(root)
    assert "unnamed" not in kinds(inventory(root))


@pytest.mark.parametrize(
    ("size", "means"),
    [("0", 0), ("1000", 1000), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("20k", 20_000),
     ("7B", 7)]
)  # fmt: skip
def test_a_size_is_read_with_its_unit(size: str, means: int) -> None:
    assert parse_size(size) == means


@pytest.mark.parametrize("size", ["", "much", "-1GB", "5 parsecs", "1iB", "GB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="give one like 5GB"):
        parse_size(size)


def test_a_folder_without_a_store_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="is not a store"):
        inventory(tmp_path)
    assert list(tmp_path.iterdir()) == []
