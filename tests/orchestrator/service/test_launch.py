"""Whole studies of a tiny model, inline: what is shared, resumed, refused, and left behind by a kill."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.executors.inline import InlineExecutor
from cluster.storage.local_store import LocalStore
from cluster.storage.open import open_store
from jobs import run
from jobs.job import Failure, Job, Outcome
from jobs.models import loading
from orchestrator.cli import app
from orchestrator.config.load import load
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.lock import only_one
from orchestrator.planning.candidates import KnownMetrics, propose
from orchestrator.planning.cost import CostModel
from orchestrator.planning.initial_design import initial_design
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing.export import export_member
from orchestrator.service.fit_predictors import fit_predictors
from orchestrator.service.launch import OtherStudyError, launch
from orchestrator.service.loop import Service
from orchestrator.service.status import Status, line
from orchestrator.study.results import Results
from orchestrator.worker import work as working
from orchestrator.worker.watchdog import STALL_SECONDS
from orchestrator.worker.work import WorkerContext, work


def unseen(status: object) -> None:
    pass


def workplace(prepared: PreparedStudy) -> WorkerContext:
    store = Path(prepared.config.store)
    return WorkerContext(prepared.materials, str(store), prepared.folder.scratch, store / "cache")


def counted(prepared: PreparedStudy, done: list[Job]) -> Callable[[Job], Outcome]:
    """The real work, which notes what it does."""

    def do(job: Job) -> Outcome:
        done.append(job)
        return work(job, workplace(prepared))

    return do


def run_inline(prepared: PreparedStudy, do: Callable[[Job], Outcome] | None = None) -> Results:
    return launch(prepared, unseen, executor=InlineExecutor(), do=do)


def test_a_study_ends_with_a_front_of_measured_files(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    results = run_inline(ready)
    assert [c.state for c in results.candidates] == ["measured"] * 6
    assert results.members
    store = open_store(ready.config.store)
    written = json.loads(ready.folder.front.read_text())
    assert [member["id"] for member in written["members"]] == results.members
    for member in written["members"]:
        assert store.record(f"artifacts/{member['id']}") is not None
        apart = member["differences"]["accuracy"]["value"]
        both = (row["metrics"]["accuracy"] for row in (member, written["original"]))
        assert apart == pytest.approx(next(both) - next(both))
    for candidate in results.candidates:
        assert candidate.measurement is not None
        assert candidate.measurement.metrics["size_bytes"] == candidate.size_bytes
    assert results.original.recipe.steps == ()
    assert ready.folder.report.stat().st_size > 1000


def test_results_of_another_study_are_reused(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared())
    ran: list[Job] = []

    def count(job: Job) -> Outcome:
        ran.append(job)
        return work(job, workplace(prepared()))

    attempted: list[Job] = []
    original_attempt = run.attempt
    try:
        run.attempt = lambda request, report: (
            attempted.append(request.job) or original_attempt(request, report)
        )  # type: ignore[assignment,func-returns-value]
        run_inline(prepared("name=other"), count)
    finally:
        run.attempt = original_attempt
    assert len(ran) >= 6
    assert attempted == []
    page = prepared("name=other").folder.report.read_text()
    assert f"{len(ran)} jobs already in the store" in page


def test_a_finished_study_runs_nothing_when_it_is_started_again(
    prepared: Callable[..., PreparedStudy],
) -> None:
    first = run_inline(prepared())
    second = run_inline(prepared(), lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert second.members == first.members


def test_a_study_goes_on_with_more_candidates(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared("search.candidates=2"))
    results = run_inline(prepared("search.candidates=4"))
    assert [c.state for c in results.candidates] == ["measured"] * 5


def test_a_study_tells_what_it_took(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared("search.candidates=1", "cluster.price_per_hour=3600", "budget.money=1e6")
    run_inline(ready)
    status = json.loads(ready.folder.status.read_text())
    assert status["cost"] == pytest.approx(3600 * status["node_hours"])
    assert 0 < status["node_hours"] < 0.1
    assert line(Status(**status)).endswith(f"{status['cost']:.2f} of 1000000.00")
    told = CliRunner().invoke(app.app, ["status", str(ready.folder)]).output
    page = ready.folder.report.read_text()
    for where in (told, page):
        assert "node: 0.00 node-hours, 3600.00 each (cluster.price_per_hour)" in where
    assert "It ended early" not in page


def test_a_study_whose_budget_is_spent_tells_what_was_not_done_and_a_larger_one_goes_on(
    prepared: Callable[..., PreparedStudy],
) -> None:
    short = prepared("budget.hours=1e-9")
    results = run_inline(short, lambda job: pytest.fail(f"{job.recipe} ran"))
    assert [one.state for one in results.candidates] == ["waiting"]
    page = short.folder.report.read_text()
    assert "It ended early: the budget of 1e-09 hours is spent; 5 candidates were not tried" in page
    assert json.loads(short.folder.status.read_text())["exhausted"] == "the budget of 1e-09 hours is spent"
    results = run_inline(prepared("budget.hours=100"))
    assert [one.state for one in results.candidates] == ["measured"] * 6
    assert "It ended early" not in short.folder.report.read_text()


def test_a_folder_that_holds_another_study_is_refused(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared("search.candidates=1"))
    with pytest.raises(OtherStudyError, match="holds a study with another model"):
        run_inline(prepared("search.candidates=1", "search.seed=5"))


def test_two_processes_never_run_one_study(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    with only_one(ready.folder.path), pytest.raises(BlockingIOError):
        run_inline(ready)


def test_a_candidate_that_fails_is_recorded_with_its_reason_and_the_study_goes_on(
    prepared: Callable[..., PreparedStudy],
) -> None:
    ready = prepared()

    def flaky(job: Job) -> Outcome:
        if any(step.name() == "rtn" for step in job.recipe.steps):
            return Failure("diverged", "perplexity came out as nan")
        return work(job, workplace(ready))

    results = run_inline(ready, flaky)
    failed = [c for c in results.candidates if c.state == "failed"]
    assert failed
    assert {c.failure.kind for c in failed if c.failure} == {"diverged"}
    assert len(failed) + sum(c.state == "measured" for c in results.candidates) == 6


def test_a_lost_worker_is_tried_again(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("search.candidates=2")
    tries: Counter[str] = Counter()

    def dying(job: Job) -> Outcome:
        tries[job.id] += 1
        if tries[job.id] == 1:
            raise ConnectionError("the worker went away")
        return work(job, workplace(ready))

    results = run_inline(ready, dying)
    assert all(c.state == "measured" for c in results.candidates)
    assert all(c.attempts >= 2 for c in results.candidates)


def test_a_limit_on_the_size_binds(prepared: Callable[..., PreparedStudy]) -> None:
    limit = prepared().plan.original_cost.size_bytes * 0.6
    results = run_inline(prepared(f"objectives.size_bytes.limit={limit}"))
    smaller = [c for c in results.candidates if c is not results.original]
    assert smaller
    assert all(c.size_bytes <= limit for c in smaller)
    assert all(c.recipe.steps for c in results.candidates if c.id in results.members)


def test_an_exported_member_is_read_back_to_the_model_that_was_measured(
    prepared: Callable[..., PreparedStudy], tmp_path: Path
) -> None:
    import torch

    ready = prepared()
    results = run_inline(ready)
    member = export_member(ready.folder.path, "smallest", tmp_path / "out")
    exported = loading.load(tmp_path / "out")
    record = open_store(ready.config.store).record(f"artifacts/{member.id}")
    assert record is not None
    held = next((Path(ready.config.store) / "objects").glob(f"*/{record['digest']}"))
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        ours, theirs = exported.module(tokens).logits, loading.load(held).module(tokens).logits
    assert torch.equal(ours, theirs)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == member.measured.metrics["size_bytes"]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["id"] == results.members[0]
    with pytest.raises(FileExistsError):
        export_member(ready.folder.path, "smallest", tmp_path / "out")
    with pytest.raises(LookupError, match="no member is called"):
        export_member(ready.folder.path, "prettiest", tmp_path / "other")


KILLS = 14


def _run_until(file: Path, log: Path, kill_at: int) -> None:
    """Run the study inline in this process and die by SIGKILL at the `kill_at`-th thing that could be torn."""
    left = [kill_at]

    def reach() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def stepped(*given: Any, **named: Any) -> Any:
            reach()
            value = whole(*given, **named)
            reach()
            return value

        setattr(owner, name, stepped)

    torn(Ledger, "append")
    torn(Service, "_carry_out")
    torn(LocalStore, "commit")
    torn(LocalStore, "put")
    attempt = working._attempt

    def counted(job: Job, *given: Any) -> Any:
        with log.open("a") as stream:  # outside the ledger, in one write
            stream.write(f"{time.time_ns()} {job.id}\n")
        return attempt(job, *given)

    working._attempt = counted  # type: ignore[assignment]
    run_inline(prepare(load(file)))


@pytest.mark.timeout(240)
def test_killed_anywhere_the_same_command_goes_on_and_no_committed_candidate_runs_again(
    study_file: Path, tmp_path: Path, prepared: Callable[..., PreparedStudy]
) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["orchestrator.service.launch", "jobs.run", "jobs.techniques.rtn", "pytest"]
    )
    log = tmp_path / "executions.log"
    log.touch()
    killed = 0
    for round in range(100):
        # Every process dies a little later in its life than the last, at another kind of step.
        child = processes.Process(
            target=_run_until, args=(study_file, log, 2 + 2 * round if round < KILLS else 0)
        )
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 10
    ready = prepared()
    committed = {
        file.stem: file.stat().st_mtime_ns for file in Path(ready.config.store).glob("records/results/*.json")
    }
    runs = [line.split() for line in log.read_text().splitlines()]
    assert len(committed) >= 6
    assert {job for _, job in runs} == set(committed)
    assert all(int(at) < committed[job] for at, job in runs)
    assert len(runs) <= len(committed) + killed
    results = run_inline(ready, lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert [c.state for c in results.candidates] == ["measured"] * 6


def test_a_study_in_rungs_measures_on_all_of_the_evaluation_what_ends_on_the_front(
    prepared: Callable[..., PreparedStudy],
) -> None:
    done: list[Job] = []
    ready = prepared("search.rungs=[0.25]", "search.candidates=8")
    results = run_inline(ready, counted(ready, done))
    shares = {job.fidelity for job in done if job.meters}
    assert shares == {0.25, 1.0}
    assert all(results.by_id[id].fidelity == 1.0 for id in results.members)
    windows = {
        id: len(one.measurement.items["accuracy"]) for id, one in results.by_id.items() if one.measurement
    }
    assert all(windows[id] == 16 for id in results.members)
    assert all(windows[id] == 4 for id, standing in results.standings.items() if standing == "eliminated")
    again: list[Job] = []
    assert run_inline(ready, counted(ready, again)).members == results.members
    assert again == []


def test_a_study_keeps_the_rungs_that_it_began_with(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared("search.rungs=auto", "search.candidates=4", "data.evaluation.window=8")
    assert ready.plan.rungs == (1 / 8, 1 / 2, 1.0)
    run_inline(ready)
    monkeypatch.setattr("orchestrator.planning.study_meters._MIN_WINDOWS", 16)
    later = prepared("search.rungs=auto", "search.candidates=4", "data.evaluation.window=8")
    assert later.plan.rungs == (1 / 4, 1.0)
    results = run_inline(later, lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert [one.state for one in results.candidates] == ["measured"] * 5


def test_a_study_of_an_earlier_version_goes_on_by_its_rungs(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(
        "search.rungs=auto", "search.candidates=4", "data.evaluation.window=4", "data.evaluation.tokens=1024"
    )
    assert ready.plan.rungs == (1 / 32, 1 / 8, 1 / 2, 1.0)
    earlier = dataclasses.replace(ready, plan=dataclasses.replace(ready.plan, rungs=(1 / 16, 1 / 4, 1.0)))
    run_inline(earlier)
    db = sqlite3.connect(ready.folder.ledger)
    with db:
        db.execute("delete from about where key = 'rungs'")
    db.close()
    results = run_inline(ready, lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert [one.state for one in results.candidates] == ["measured"] * 5


def test_a_study_whose_bits_differ_by_layer_begins_with_what_is_solved_and_resumes(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = study_file.read_text().split("space:")
    each = "{gptq: {bits: {choices: [2, 4, 8], each: layer}}}"
    study_file.write_text(f"{before}space: {{bits: {each}}}\nsearch:{after.partition('search:')[2]}")
    ready = prepare(load(study_file, ("search.candidates=8",)))
    results = run_inline(ready)
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 9
    monkeypatch.setattr(
        "orchestrator.service.fit_predictors.measure_layer_sensitivity",
        lambda *_: pytest.fail("measured again"),
    )
    told = fit_predictors(ready, Ledger(ready.folder.ledger), InlineExecutor())
    costs = CostModel.of(told)
    design = initial_design(told, KnownMetrics(told, costs))
    first = [propose(told, costs, choices).recipe.id for choices in design]
    assert first == [candidate.id for candidate in results.candidates[1:]][: len(first)]
    again = run_inline(prepare(load(study_file, ("search.candidates=10",))))
    assert len(again.candidates) == 11


def test_on_a_cluster_there_are_as_many_slots_as_it_has_cores(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):  # noqa: N818
        pass

    def executor(
        slots: int | None,
        memory_gib: float | None,
        address: str | None,
        env: dict[str, str],
        start_seconds: float,
    ) -> None:
        raise Asked(slots, address, env)

    monkeypatch.setattr("orchestrator.service.launch.RayExecutor", executor)
    for overrides, asked in (
        (["cluster.address=auto"], (None, "auto", {STALL_SECONDS: "3600.0"})),
        (
            ["cluster.address=auto", "cluster.slots=3", "cluster.stall_seconds=60"],
            (3, "auto", {STALL_SECONDS: "60.0"}),
        ),
        (["cluster.stall_seconds=null"], (os.cpu_count(), None, {})),
    ):
        with pytest.raises(Asked) as found:
            launch(prepared(*overrides), lambda status: None)
        assert found.value.args == asked
