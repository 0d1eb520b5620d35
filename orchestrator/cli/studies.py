"""Commands about studies: validate, plan, search, resume, status, front, report."""

from __future__ import annotations

import functools
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.console import (
    USER_ERRORS,
    AsJson,
    ExitCode,
    Folder,
    FolderOrUrl,
    Insecure,
    OnCluster,
    Overrides,
    StudyFile,
    exit_on_error,
    fail,
    prepared_study,
    recorded_overrides,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.remote import connect_cluster, job_status, print_submission, remote_location
from orchestrator.cli.tables import megabytes, print_failures, print_json, show_front

if TYPE_CHECKING:
    from orchestrator.planning.prepared_study import PreparedStudy
    from orchestrator.service.forecast import Forecast
    from orchestrator.study.front_snapshot import FrontSnapshot
    from orchestrator.study.results import Results

_RENAMED_STATUS_FIELDS = {"to_time": "timings_left"}
"""Fields of `status.json` as earlier versions spell them, with the names of today."""


def validate(study: StudyFile, overrides: Overrides = None) -> None:
    """Check a study and report every problem. Starts nothing."""
    prepared = prepared_study(study, overrides)
    stdout_console().print(
        f"{study} is valid: {prepared.config.name}, {len(prepared.space.stages)} stages, "
        f"{len(prepared.space.knobs())} knobs, original {megabytes(prepared.plan.original_cost.size_bytes)}"
    )


def plan(study: StudyFile, overrides: Overrides = None) -> None:
    """Show the jobs of a search, the shared steps, exact sizes, time and cost. Runs nothing."""
    from cluster.storage.open import open_store
    from orchestrator import search
    from orchestrator.planning.candidates import KnownMetrics
    from orchestrator.planning.cost import CostModel
    from orchestrator.planning.initial_design import initial_design
    from orchestrator.planning.job_resources import local_slots
    from orchestrator.service.forecast import costs, forecast

    prepared = prepared_study(study, overrides)
    config = prepared.config
    knobs = prepared.space.knobs()
    cost_model = CostModel.of(prepared)
    known = KnownMetrics(prepared, cost_model)
    searching = search.make(
        config.search.algorithm, knobs, prepared.plan.objectives, known, config.search.seed,
        initial_design(prepared, known),
    )  # fmt: skip
    expected = forecast(prepared, cost_model, searching, open_store(config.store))
    original_bytes = prepared.plan.original_cost.size_bytes
    out = stdout_console()
    out.print(_proposals_table(expected, config.search.algorithm, original_bytes))
    slots = local_slots(config)

    def minutes(seconds: float) -> str:
        return f"{seconds / slots / 60:.1f}"

    source = "from earlier jobs of this store" if expected.measured else "estimated from operation counts"
    out.print(
        f"{len(expected.proposals)} candidates, {expected.steps} steps, {expected.jobs} distinct jobs "
        f"({expected.steps - expected.jobs} shared steps), {expected.found} of them in the store already.\n"
        f"About {minutes(expected.seconds)} minutes on {slots} slots ({source}). Sizes are exact; "
        f"the original has {megabytes(original_bytes)}.\n"
        f"Saved: about {minutes(expected.shared_seconds)} minutes by shared steps, "
        f"{minutes(expected.found_seconds)} by results in the store; shared statistics save more."
    )
    for line in costs(prepared, expected):
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _proposals_table(expected: Forecast, algorithm: str, original_bytes: int) -> Table:
    title = f"First proposals of {algorithm}"
    table = Table("recipe", "MB", "of original", title=title, title_justify="left")
    for proposal in sorted(expected.proposals, key=lambda p: p.cost.size_bytes if p.cost else 0):
        if proposal.cost is None:
            table.add_row(str(proposal.recipe), "refused", proposal.refused or "")
        else:
            size = proposal.cost.size_bytes
            table.add_row(str(proposal.recipe), f"{size / 1e6:.1f}", f"{size / original_bytes:.0%}")
    return table


def search(study: StudyFile, overrides: Overrides = None) -> None:
    """Run a study, or resume it. Completed work is not repeated."""
    _run(prepared_study(study, overrides), tuple(overrides or ()))


def resume(folder: Folder, address: OnCluster = None, insecure: Insecure = False) -> None:
    """Resume an interrupted study from its folder, or with --address by its name on a cluster."""
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.service import submission

    if address is not None:
        with connect_cluster(address, insecure) as jobs:
            print_submission(submission.resume(str(folder), jobs))
        return
    files = StudyFolder(folder)
    if not files.ledger.is_file():
        fail(f"{folder} is not the folder of a study: it has no {files.ledger.name}")
    overrides = recorded_overrides(folder)
    _run(prepared_study(files.study_file, overrides), tuple(overrides))


def status(
    folder: Folder, as_json: AsJson = False, address: OnCluster = None, insecure: Insecure = False
) -> None:
    """Show the progress of a study, or with --address the status of its job on a cluster."""
    from orchestrator.persistence.lock import is_running
    from orchestrator.service.status import Status, line

    if address is not None:
        job_status(str(folder), address, insecure, as_json)
        return
    fields = _read_status(folder)
    running = is_running(folder)
    if as_json:
        print_json({**fields, "process": "running" if running else "stopped"})
        return
    current = Status(**{_RENAMED_STATUS_FIELDS.get(name, name): value for name, value in fields.items()})
    if current.stage == "done":
        state = "running" if running else "done"
    elif running:
        state = f"running, {current.stage}"
    else:
        state = f"stopped, {current.stage}; slimfront resume {folder} resumes it"
    out = stdout_console()
    progress = f"{current.ended}/{current.candidates + 1} ended, {line(current)}"
    out.print(f"{current.study}: {state}, {progress}", soft_wrap=True, markup=False)
    if current.spent:
        for cost in current.bill:
            out.print(f"  {cost}", soft_wrap=True, markup=False, highlight=False)


def front(
    folder: FolderOrUrl,
    as_json: AsJson = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Show the Pareto front of a study and the original; the front of a study in a bucket after it has ended."""
    location = folder if address is None else remote_location(folder, address, insecure)
    snapshot = _read_front(location)
    if as_json:
        print_json(snapshot.to_dict())
    else:
        show_front(snapshot)


def report(
    folder: FolderOrUrl,
    open_in_browser: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Print the path of a study's report; the report of a study in a bucket is written to NAME.html first."""
    page = _find_report(folder if address is None else remote_location(folder, address, insecure))
    stdout_console().print(str(page), soft_wrap=True, markup=False, highlight=False)
    if open_in_browser:
        typer.launch(str(page))


def _run(prepared: PreparedStudy, overrides: tuple[str, ...]) -> None:
    """Run the study to its end and print its front. Without a front, the command ends with NO_RESULT."""
    from orchestrator.service.launch import launch
    from orchestrator.service.status import Display

    err = stderr_console()
    explain = functools.partial(_explain, prepared=prepared)
    interrupted = f"Interrupted. {_resume_hint(prepared)}"
    with exit_on_error(Exception, explain=explain, interrupted=interrupted), Display(err) as display:
        results = launch(prepared, display.show, overrides)
    failure = results.original.failure
    if failure is not None:
        err.print(f"The original could not be measured: {failure.message}", style="red")
        raise typer.Exit(ExitCode.NO_RESULT)
    exhausted = _read_status(prepared.folder.path).get("exhausted")
    if results.original.measurement is None:
        print_failures(results, exhausted)
        err.print("Neither the original nor any candidate was measured.", style="red")
        raise typer.Exit(ExitCode.NO_RESULT)
    snapshot = _read_front(str(prepared.folder))
    show_front(snapshot)
    _publish(prepared, results)
    print_failures(results, exhausted)
    err.print(f"Report: {prepared.folder.report}")
    if not results.members:
        raise typer.Exit(ExitCode.NO_RESULT)


def _explain(error: Exception, prepared: PreparedStudy) -> str | None:
    """Return the message for an error of a running study; None for an unexpected error."""
    from cluster.executors.executor import ExecutorUnavailableError
    from cluster.storage.open import is_remote
    from jobs.failures import disk_is_full
    from orchestrator.service.launch import OtherStudyError

    folder = prepared.folder
    if isinstance(error, BlockingIOError):
        return f"another process runs the study in {folder}; see slimfront status {folder}"
    if isinstance(error, OtherStudyError):
        return str(error)
    if isinstance(error, ExecutorUnavailableError):
        return f"{error}. {_resume_hint(prepared)}"
    if isinstance(error, (OSError, sqlite3.Error)) and disk_is_full(error):
        advice = "Free some space"
        if not is_remote(prepared.config.store):
            advice += f" (slimfront store {folder.home} --trim 5GB evicts items that can be made again)"
        return f"The disk with {folder} is full. {advice}. {_resume_hint(prepared)}"
    return None


def _resume_hint(prepared: PreparedStudy) -> str:
    from cluster.on_ray.jobs_api import in_job

    # The folder of a job is on the cluster, so the study is resumed by its name.
    command = f"{prepared.config.name} --address URL" if in_job() else str(prepared.folder)
    return f"Completed work is kept; resume with: slimfront resume {command}"


def _publish(prepared: PreparedStudy, results: Results) -> None:
    """Copy the front and the report to a remote store."""
    from orchestrator.persistence.published import publish
    from orchestrator.study.results import front_snapshot

    try:
        page = prepared.folder.report.read_text(encoding="utf-8")
        publish(prepared.config.store, prepared.config.name, front_snapshot(results).to_dict(), page)
    except OSError as error:
        warning = f"The front is not in the store yet: {error}. slimfront resume {prepared.folder} copies it"
        stderr_console().print(warning, soft_wrap=True, markup=False)


def _read_status(folder: Path) -> dict[str, Any]:
    from orchestrator.persistence.study_folder import StudyFolder

    file = StudyFolder(folder).status
    if not file.is_file():
        fail(f"{file} does not exist: {folder} is not the folder of a study")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _read_front(location: str) -> FrontSnapshot:
    """Read the front of a study's folder or of a study in a bucket."""
    from cluster.storage.open import is_remote
    from orchestrator.persistence.front_file import read_front
    from orchestrator.persistence.published import published
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.study.front_snapshot import FrontSnapshot

    with exit_on_error(*USER_ERRORS):
        if is_remote(location):
            return FrontSnapshot.from_dict(published(location))
        return read_front(StudyFolder(Path(location)).front)


def _find_report(location: str) -> Path:
    """Return the report of a study's folder, or write that of a study in a bucket to NAME.html."""
    from cluster.storage.open import is_remote
    from orchestrator.persistence.atomic_files import write_whole
    from orchestrator.persistence.published import published_report
    from orchestrator.persistence.study_folder import StudyFolder

    if is_remote(location):
        page = Path(f"{location.partition('?')[0].rpartition('/')[2]}.html")
        with exit_on_error(*USER_ERRORS):
            write_whole(page, published_report(location))
        return page
    page = StudyFolder(Path(location)).report
    if not page.is_file():
        fail(f"{page} does not exist: it is written at the end of a search")
    return page
