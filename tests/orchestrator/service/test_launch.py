"""Complete inline studies of a tiny model: shared work, resumption, refusals, and the state after a kill."""

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


def ignore_status(status: object) -> None:
    pass


def worker_context(prepared: PreparedStudy) -> WorkerContext:
    store = Path(prepared.config.store)
    return WorkerContext(prepared.materials, str(store), prepared.folder.scratch, store / "cache")


def recording_work(prepared: PreparedStudy, executed: list[Job]) -> Callable[[Job], Outcome]:
    """Return the real work function, which also appends each job to `executed`."""

    def do(job: Job) -> Outcome:
        executed.append(job)
        return work(job, worker_context(prepared))

    return do


def run_inline(prepared: PreparedStudy, do: Callable[[Job], Outcome] | None = None) -> Results:
    return launch(prepared, ignore_status, executor=InlineExecutor(), do=do)


def test_a_study_ends_with_a_front_of_measured_files(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    results = run_inline(ready)
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 6
    assert results.members
    store = open_store(ready.config.store)
    written = json.loads(ready.folder.front.read_text())
    assert [member["id"] for member in written["members"]] == results.members
    for member in written["members"]:
        assert store.record(f"artifacts/{member['id']}") is not None
        accuracy_difference = member["differences"]["accuracy"]["value"]
        accuracies = (model["metrics"]["accuracy"] for model in (member, written["original"]))
        assert accuracy_difference == pytest.approx(next(accuracies) - next(accuracies))
    for candidate in results.candidates:
        assert candidate.measurement is not None
        assert candidate.measurement.metrics["size_bytes"] == candidate.size_bytes
    assert results.original.recipe.steps == ()
    assert ready.folder.report.stat().st_size > 1000


def test_results_of_another_study_are_reused(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared())
    executed: list[Job] = []

    def recorded_work(job: Job) -> Outcome:
        executed.append(job)
        return work(job, worker_context(prepared()))

    attempted: list[Job] = []
    original_attempt = run.attempt
    try:
        run.attempt = lambda request, report: (
            attempted.append(request.job) or original_attempt(request, report)
        )  # type: ignore[assignment,func-returns-value]
        run_inline(prepared("name=other"), recorded_work)
    finally:
        run.attempt = original_attempt
    assert len(executed) >= 6
    assert attempted == []
    page = prepared("name=other").folder.report.read_text()
    assert f"{len(executed)} jobs already in the store" in page


def test_a_finished_study_runs_nothing_when_it_is_started_again(
    prepared: Callable[..., PreparedStudy],
) -> None:
    first = run_inline(prepared())
    second = run_inline(prepared(), lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert second.members == first.members


def test_a_study_resumes_with_more_candidates(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared("search.candidates=2"))
    results = run_inline(prepared("search.candidates=4"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 5


def test_a_study_reports_its_node_hours_and_cost(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared("search.candidates=1", "cluster.price_per_hour=3600", "budget.money=1e6")
    run_inline(ready)
    status = json.loads(ready.folder.status.read_text())
    assert status["cost"] == pytest.approx(3600 * status["node_hours"])
    assert 0 < status["node_hours"] < 0.1
    assert line(Status(**status)).endswith(f"{status['cost']:.2f} of 1000000.00")
    status_output = CliRunner().invoke(app.app, ["status", str(ready.folder)]).output
    page = ready.folder.report.read_text()
    for output in (status_output, page):
        assert "node: 0.00 node-hours, 3600.00 each (cluster.price_per_hour)" in output
    assert "It ended early" not in page


def test_a_study_with_a_spent_budget_reports_untried_candidates_and_resumes_with_a_larger_one(
    prepared: Callable[..., PreparedStudy],
) -> None:
    short = prepared("budget.hours=1e-9")
    results = run_inline(short, lambda job: pytest.fail(f"{job.recipe} ran"))
    assert [candidate.state for candidate in results.candidates] == ["waiting"]
    page = short.folder.report.read_text()
    assert "It ended early: the budget of 1e-09 hours is spent; 5 candidates were not tried" in page
    assert json.loads(short.folder.status.read_text())["exhausted"] == "the budget of 1e-09 hours is spent"
    results = run_inline(prepared("budget.hours=100"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 6
    assert "It ended early" not in short.folder.report.read_text()


def test_a_folder_that_holds_another_study_is_refused(prepared: Callable[..., PreparedStudy]) -> None:
    run_inline(prepared("search.candidates=1"))
    with pytest.raises(OtherStudyError, match="holds a study with another model"):
        run_inline(prepared("search.candidates=1", "search.seed=5"))


def test_two_processes_never_run_one_study(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    with only_one(ready.folder.path), pytest.raises(BlockingIOError):
        run_inline(ready)


def test_a_failed_candidate_is_recorded_with_its_reason_and_the_study_continues(
    prepared: Callable[..., PreparedStudy],
) -> None:
    ready = prepared()

    def flaky(job: Job) -> Outcome:
        if any(step.name() == "rtn" for step in job.recipe.steps):
            return Failure("diverged", "perplexity came out as nan")
        return work(job, worker_context(ready))

    results = run_inline(ready, flaky)
    failed = [candidate for candidate in results.candidates if candidate.state == "failed"]
    assert failed
    assert {candidate.failure.kind for candidate in failed if candidate.failure} == {"diverged"}
    assert len(failed) + sum(candidate.state == "measured" for candidate in results.candidates) == 6


def test_a_job_is_retried_after_its_worker_is_lost(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("search.candidates=2")
    attempts: Counter[str] = Counter()

    def lose_first_worker(job: Job) -> Outcome:
        attempts[job.id] += 1
        if attempts[job.id] == 1:
            raise ConnectionError("the worker went away")
        return work(job, worker_context(ready))

    results = run_inline(ready, lose_first_worker)
    assert all(candidate.state == "measured" for candidate in results.candidates)
    assert all(candidate.attempts >= 2 for candidate in results.candidates)


def test_candidates_respect_a_limit_on_the_size(prepared: Callable[..., PreparedStudy]) -> None:
    limit = prepared().plan.original_cost.size_bytes * 0.6
    results = run_inline(prepared(f"objectives.size_bytes.limit={limit}"))
    smaller = [candidate for candidate in results.candidates if candidate is not results.original]
    assert smaller
    assert all(candidate.size_bytes <= limit for candidate in smaller)
    assert all(candidate.recipe.steps for candidate in results.candidates if candidate.id in results.members)


def test_an_exported_member_equals_the_measured_model(
    prepared: Callable[..., PreparedStudy], tmp_path: Path
) -> None:
    import torch

    ready = prepared()
    results = run_inline(ready)
    member = export_member(ready.folder.path, "smallest", tmp_path / "out")
    exported = loading.load(tmp_path / "out")
    record = open_store(ready.config.store).record(f"artifacts/{member.id}")
    assert record is not None
    stored = next((Path(ready.config.store) / "objects").glob(f"*/{record['digest']}"))
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        exported_logits, stored_logits = (
            exported.module(tokens).logits,
            loading.load(stored).module(tokens).logits,
        )
    assert torch.equal(exported_logits, stored_logits)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == member.measured.metrics["size_bytes"]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["id"] == results.members[0]
    with pytest.raises(FileExistsError):
        export_member(ready.folder.path, "smallest", tmp_path / "out")
    with pytest.raises(LookupError, match="no member is called"):
        export_member(ready.folder.path, "prettiest", tmp_path / "other")


KILLS = 14


def _run_until(file: Path, log: Path, kill_at: int) -> None:
    """Run the study inline in this process and kill it with SIGKILL at the `kill_at`-th interruptible operation."""
    remaining_operations = [kill_at]

    def count_operation() -> None:
        remaining_operations[0] -= 1
        if remaining_operations[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def make_interruptible(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def interruptible(*args: Any, **kwargs: Any) -> Any:
            count_operation()
            value = function(*args, **kwargs)
            count_operation()
            return value

        setattr(owner, name, interruptible)

    make_interruptible(Ledger, "append")
    make_interruptible(Service, "_carry_out")
    make_interruptible(LocalStore, "commit")
    make_interruptible(LocalStore, "put")
    attempt = working._attempt

    def logged_attempt(job: Job, *args: Any) -> Any:
        with log.open("a") as stream:  # this log is independent of the ledger and written in one call
            stream.write(f"{time.time_ns()} {job.id}\n")
        return attempt(job, *args)

    working._attempt = logged_attempt  # type: ignore[assignment]
    run_inline(prepare(load(file)))


@pytest.mark.timeout(240)
def test_a_study_killed_anywhere_resumes_and_repeats_no_committed_candidate(
    study_file: Path, tmp_path: Path, prepared: Callable[..., PreparedStudy]
) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["orchestrator.service.launch", "jobs.run", "jobs.techniques.rtn", "pytest"]
    )
    log = tmp_path / "executions.log"
    log.touch()
    kills = 0
    for attempt_index in range(100):
        # Each process dies a little later in its run than the previous one, at a different kind of operation.
        child = processes.Process(
            target=_run_until, args=(study_file, log, 2 + 2 * attempt_index if attempt_index < KILLS else 0)
        )
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 10
    ready = prepared()
    committed = {
        file.stem: file.stat().st_mtime_ns for file in Path(ready.config.store).glob("records/results/*.json")
    }
    runs = [line.split() for line in log.read_text().splitlines()]
    assert len(committed) >= 6
    assert {job_id for _, job_id in runs} == set(committed)
    assert all(int(start_ns) < committed[job_id] for start_ns, job_id in runs)
    assert len(runs) <= len(committed) + kills
    results = run_inline(ready, lambda job_id: pytest.fail(f"{job_id.recipe} ran again"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 6


def test_a_study_with_rungs_evaluates_its_front_members_fully(
    prepared: Callable[..., PreparedStudy],
) -> None:
    executed: list[Job] = []
    ready = prepared("search.rungs=[0.25]", "search.candidates=8")
    results = run_inline(ready, recording_work(ready, executed))
    shares = {job.fidelity for job in executed if job.meters}
    assert shares == {0.25, 1.0}
    assert all(results.by_id[id].fidelity == 1.0 for id in results.members)
    windows = {
        id: len(candidate.measurement.items["accuracy"])
        for id, candidate in results.by_id.items()
        if candidate.measurement
    }
    assert all(windows[id] == 16 for id in results.members)
    assert all(windows[id] == 4 for id, standing in results.standings.items() if standing == "eliminated")
    repeated: list[Job] = []
    assert run_inline(ready, recording_work(ready, repeated)).members == results.members
    assert repeated == []


def test_a_resumed_study_keeps_its_initial_rungs(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared("search.rungs=auto", "search.candidates=4", "data.evaluation.window=8")
    assert ready.plan.rungs == (1 / 8, 1 / 2, 1.0)
    run_inline(ready)
    monkeypatch.setattr("orchestrator.planning.study_meters._MIN_WINDOWS", 16)
    resumed = prepared("search.rungs=auto", "search.candidates=4", "data.evaluation.window=8")
    assert resumed.plan.rungs == (1 / 4, 1.0)
    results = run_inline(resumed, lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 5


def test_a_study_of_an_earlier_version_resumes_with_its_rungs(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(
        "search.rungs=auto", "search.candidates=4", "data.evaluation.window=4", "data.evaluation.tokens=1024"
    )
    assert ready.plan.rungs == (1 / 32, 1 / 8, 1 / 2, 1.0)
    earlier = dataclasses.replace(ready, plan=dataclasses.replace(ready.plan, rungs=(1 / 16, 1 / 4, 1.0)))
    run_inline(earlier)
    database = sqlite3.connect(ready.folder.ledger)
    with database:
        database.execute("delete from about where key = 'rungs'")
    database.close()
    results = run_inline(ready, lambda job: pytest.fail(f"{job.recipe} ran again"))
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 5


def test_a_study_with_bits_per_layer_starts_with_the_solved_initial_design_and_resumes(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, sections = study_file.read_text().split("space:")
    bits_per_layer = "{gptq: {bits: {choices: [2, 4, 8], each: layer}}}"
    study_file.write_text(
        f"{header}space: {{bits: {bits_per_layer}}}\nsearch:{sections.partition('search:')[2]}"
    )
    ready = prepare(load(study_file, ("search.candidates=8",)))
    results = run_inline(ready)
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 9
    monkeypatch.setattr(
        "orchestrator.service.fit_predictors.measure_layer_sensitivity",
        lambda *_: pytest.fail("measured again"),
    )
    fitted = fit_predictors(ready, Ledger(ready.folder.ledger), InlineExecutor())
    costs = CostModel.of(fitted)
    design = initial_design(fitted, KnownMetrics(fitted, costs))
    initial_ids = [propose(fitted, costs, choices).recipe.id for choices in design]
    assert initial_ids == [candidate.id for candidate in results.candidates[1:]][: len(initial_ids)]
    resumed = run_inline(prepare(load(study_file, ("search.candidates=10",))))
    assert len(resumed.candidates) == 11


def test_the_number_of_slots_follows_the_cluster(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaunchedError(Exception):
        pass

    def executor(
        slots: int | None,
        memory_gib: float | None,
        address: str | None,
        env: dict[str, str],
        start_seconds: float,
    ) -> None:
        raise LaunchedError(slots, address, env)

    monkeypatch.setattr("orchestrator.service.launch.RayExecutor", executor)
    for overrides, expected in (
        (["cluster.address=auto"], (None, "auto", {STALL_SECONDS: "3600.0"})),
        (
            ["cluster.address=auto", "cluster.slots=3", "cluster.stall_seconds=60"],
            (3, "auto", {STALL_SECONDS: "60.0"}),
        ),
        (["cluster.stall_seconds=null"], (os.cpu_count(), None, {})),
    ):
        with pytest.raises(LaunchedError) as error:
            launch(prepared(*overrides), lambda status: None)
        assert error.value.args == expected
