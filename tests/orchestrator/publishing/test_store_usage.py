"""Trimmed stores: results stay valid, and artifacts that are needed again are recreated."""

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
    """Prepares the tiny study with a random search, whose distinct choices have several steps from the start."""
    return lambda *overrides: prepare(load(study_file, ("search.algorithm=random", *overrides)))


@pytest.fixture
def executed_jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Return the executed jobs in order."""
    jobs: list[Job] = []
    attempt = run.attempt

    def recorded_attempt(request: run.WorkRequest, report: Report) -> object:
        jobs.append(request.job)
        return attempt(request, report)

    monkeypatch.setattr(run, "attempt", recorded_attempt)
    return jobs


def run_inline(ready: PreparedStudy) -> Results:
    root = Path(ready.config.store)
    context = WorkerContext(ready.materials, str(root), ready.folder.scratch, root / "cache")

    def do(job: Job) -> Outcome:
        return work(job, context)

    return launch(ready, lambda status: None, executor=InlineExecutor(), do=do)


def trim(root: Path, limit_bytes: int = 0) -> list[Item]:
    return remove(inventory(root).to_evict(limit_bytes))


def kinds(content: Inventory) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in content.items:
        if item.size_bytes:
            counts[item.kind] = counts.get(item.kind, 0) + item.number
    return counts


SPACE = "space={depth: {drop_layers: {count: 1}}, bits: {gptq: {bits: [3, 4, 8]}}}"
"""All candidates share at most one intermediate model and its statistics."""


def test_the_inventory_reports_the_content_of_a_store_by_kind(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    results = run_inline(ready)
    root = Path(ready.config.store)
    (ready.folder.checkpoints / "0123").mkdir(parents=True)
    (ready.folder.checkpoints / "0123" / "state").write_bytes(b"x" * 1000)
    content = inventory(root)
    counts = kinds(content)
    assert counts["originals"] == 1
    assert counts["fronts"] == len([id for id in results.members if id != results.original.id])
    assert counts["originals"] + counts["fronts"] + counts["candidates"] == 6
    assert counts["intermediates"] >= 1
    assert counts["checkpoints"] == 1
    assert counts["records"] == sum(1 for _ in (root / "records").rglob("*.json"))
    assert [study.name for study in content.studies] == ["tiny"]
    on_disk = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert content.size_bytes == on_disk


def test_a_trimmed_store_keeps_fronts_originals_and_results_and_a_study_resumes(
    prepared: Callable[..., PreparedStudy], executed_jobs: list[Job], tmp_path: Path
) -> None:
    ready = prepared("search.candidates=4")
    first_results = run_inline(ready)
    root = Path(ready.config.store)
    removed = trim(root)
    assert {item.kind for item in removed} >= {"intermediates", "candidates"}
    assert set(kinds(inventory(root))) == {"originals", "fronts", "records", "files"}
    executed_jobs.clear()

    assert run_inline(ready).members == first_results.members
    assert executed_jobs == []
    export_member(ready.folder.path, "smallest", tmp_path / "out")
    assert executed_jobs == []

    results = run_inline(prepared("search.candidates=8"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 9
    measured_jobs = [job for job in executed_jobs if job.meters]
    assert len(measured_jobs) == 4  # the new candidates
    assert all(
        old.measurement == new.measurement
        for old, new in zip(first_results.candidates, results.candidates, strict=False)
    )


def test_a_removed_parent_is_recreated_identically_for_its_child(
    prepared: Callable[..., PreparedStudy], executed_jobs: list[Job]
) -> None:
    ready = prepared(SPACE, "search.candidates=2")
    run_inline(ready)
    root = Path(ready.config.store)
    store = open_store(ready.config.store)
    records = {key: store.record(key) for key in store.records("artifacts/")}
    trim(root)
    remaining = set(store.records("artifacts/"))
    assert remaining < set(records)
    executed_jobs.clear()
    run_inline(prepared(SPACE, "search.candidates=6"))
    recreated = [job for job in executed_jobs if f"artifacts/{job.recipe.id}" in records]
    assert [str(job.recipe) for job in recreated] == ["drop_layers(count=1)"]
    for key in store.records("artifacts/"):
        assert records.get(key) in (None, store.record(key))


def test_manually_removed_artifacts_are_recreated_even_if_their_records_exist(
    prepared: Callable[..., PreparedStudy], tmp_path: Path, executed_jobs: list[Job]
) -> None:
    # These are all candidates of the space. The smallest one, on the front, has two steps.
    ready = prepared(SPACE, "search.candidates=7")
    results = run_inline(ready)
    store = open_store(ready.config.store)
    for artifact in store.holdings().artifacts:
        store.remove(artifact.ref)
    executed_jobs.clear()
    members = [candidate for candidate in results.candidates if candidate.id in results.members]
    member = next(candidate for candidate in members if len(candidate.recipe.steps) == 2)
    export_member(ready.folder.path, member.id, tmp_path / "out")
    assert [job.recipe for job in executed_jobs] == member.recipe.lineage()
    assert "made again" not in (tmp_path / "out" / "README.md").read_text()
    assert {artifact.ref.digest for artifact in store.holdings().artifacts} >= {member.artifact}


def test_an_export_states_that_its_files_were_recreated_after_the_measurement(
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


def test_the_least_valuable_items_are_evicted_first_and_only_as_many_as_necessary(
    prepared: Callable[..., PreparedStudy],
) -> None:
    ready = prepared(SPACE, "search.candidates=3")
    run_inline(ready)
    root = Path(ready.config.store)
    (ready.folder.scratch / "left").mkdir(parents=True)
    (ready.folder.scratch / "left" / "half").write_bytes(b"x" * 1000)
    content = inventory(root)
    order = [item.kind for item in content.to_evict(0)]
    assert order[0] == "scratch"
    assert order == sorted(
        order, key=["scratch", "statistics", "graphs", "intermediates", "candidates"].index
    )
    assert content.to_evict(content.size_bytes) == []
    assert [item.kind for item in content.to_evict(content.size_bytes - 1)] == ["scratch"]
    statistics = [item for item in content.items if item.kind == "statistics"]
    assert statistics
    for file in (root / "cache").glob(f"{statistics[-1].name}.*"):
        os.utime(file, (1000, 1000))
    assert [item.name for item in inventory(root).to_evict(content.size_bytes - 1001)][1] == statistics[
        -1
    ].name


def test_items_that_a_running_study_may_need_stay(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared(SPACE, "search.candidates=3")
    results = run_inline(ready)
    run_inline(prepared("name=other", "search.candidates=3"))
    root = Path(ready.config.store)
    ready.folder.scratch.mkdir(exist_ok=True)
    (ready.folder.scratch / "half").write_bytes(b"x")
    store = open_store(ready.config.store)
    all_artifacts = set(store.records("artifacts/"))
    with only_one(ready.folder.path):
        removed = trim(root)
        assert {item.kind for item in removed} == {"intermediates", "candidates", "statistics"}
        assert (ready.folder.scratch / "half").exists()
        lineages = [candidate.recipe.lineage() for candidate in results.candidates]
        needed_ids = {step.id for lineage in lineages for step in lineage}
        assert {f"artifacts/{id}" for id in needed_ids} <= set(store.records("artifacts/")) < all_artifacts
        assert list((root / "cache").glob(f"{results.original.id}-*"))


def test_scratch_files_of_a_starting_study_stay(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("search.candidates=1")
    run_inline(ready)
    ready.folder.scratch.mkdir(exist_ok=True)
    (ready.folder.scratch / "half").write_bytes(b"x")
    scratch = [item for item in inventory(Path(ready.config.store)).items if item.kind == "scratch"]
    with only_one(ready.folder.path):
        assert remove(scratch) == []
    assert (ready.folder.scratch / "half").exists()
    assert remove(scratch) == scratch
    assert not ready.folder.scratch.exists()


def test_a_trim_killed_between_record_and_artifact_leaves_a_valid_store(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(SPACE, "search.candidates=2")
    run_inline(ready)
    root = Path(ready.config.store)

    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "remove", kill)
        with pytest.raises(KeyboardInterrupt):
            trim(root)
    assert kinds(inventory(root))["unnamed"] == 1
    results = run_inline(prepared(SPACE, "search.candidates=4"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 5
    trim(root)
    assert "unnamed" not in kinds(inventory(root))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("1000", 1000), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("20k", 20_000),
     ("7B", 7)]
)  # fmt: skip
def test_a_size_is_read_with_its_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "-1GB", "5 parsecs", "1iB", "GB"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give one like 5GB"):
        parse_size(text)


def test_a_folder_without_a_store_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="is not a store"):
        inventory(tmp_path)
    assert list(tmp_path.iterdir()) == []
