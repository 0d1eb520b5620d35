"""Commands about studies: validate, plan, search, resume, status, front, report."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.console import (
    AsJson,
    Folder,
    FolderOrPlace,
    Insecure,
    OnCluster,
    Overrides,
    StudyFile,
    error_message,
    fail,
    prepared_study,
    read_json,
    recorded_overrides,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.remote import connect_cluster, job_status, print_submission, remote_location
from orchestrator.cli.tables import front_cells, megabytes, print_failures, print_json

if TYPE_CHECKING:
    from orchestrator.planning.prepared_study import PreparedStudy
    from orchestrator.study.results import Results


def validate(study: StudyFile, overrides: Overrides = None) -> None:
    """Check a study and report all that is wrong with it. Starts nothing."""
    prepared = prepared_study(study, overrides)
    stdout_console().print(
        f"{study} is valid: {prepared.config.name}, {len(prepared.space.stages)} stages, "
        f"{len(prepared.space.knobs())} knobs, original {megabytes(prepared.plan.original_cost.size_bytes)}"
    )


def plan(study: StudyFile, overrides: Overrides = None) -> None:
    """Show what a search would do: jobs, what they share, exact sizes, time. Runs nothing."""
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
    found = forecast(prepared, cost_model, searching, open_store(config.store))
    table = Table(
        "recipe",
        "MB",
        "of original",
        title=f"What {config.search.algorithm} would try first",
        title_justify="left",
    )
    original = prepared.plan.original_cost.size_bytes
    for proposal in sorted(found.proposals, key=lambda p: p.cost.size_bytes if p.cost else 0):
        if proposal.cost is None:
            table.add_row(str(proposal.recipe), "refused", proposal.refused or "")
        else:
            size = proposal.cost.size_bytes
            table.add_row(str(proposal.recipe), f"{size / 1e6:.1f}", f"{size / original:.0%}")
    slots = local_slots(config)
    source = "from what ran here before" if found.measured else "guessed from the count of operations"
    out = stdout_console()
    out.print(table)
    out.print(
        f"{len(found.proposals)} candidates, {found.steps} steps, {found.jobs} of them distinct "
        f"({found.steps - found.jobs} shared), {found.found} in the store already.\n"
        f"About {found.seconds / slots / 60:.1f} minutes on {slots} slots ({source}). Sizes are exact; "
        f"the original has {megabytes(original)}.\n"
        f"Saved: about {found.shared_seconds / slots / 60:.1f} minutes by shared steps, "
        f"{found.found_seconds / slots / 60:.1f} by what is in the store; statistics of shared models come on top."
    )
    for line in costs(prepared, found):
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def search(study: StudyFile, overrides: Overrides = None) -> None:
    """Run a study. Run again, it goes on where it was left; nothing that ended is done twice."""
    _run(prepared_study(study, overrides), tuple(overrides or ()))


def resume(folder: Folder, address: OnCluster = None, insecure: Insecure = False) -> None:
    """Go on with an interrupted study, from its folder alone, or with --address by its name on a cluster."""
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.service import submission

    if address is not None:
        with connect_cluster(address, insecure) as jobs:
            print_submission(submission.resume(str(folder), jobs))
        return
    files = StudyFolder(folder)
    if not files.ledger.is_file():
        fail(f"{folder} holds no study: there is no {files.ledger.name} in it")
    overrides = recorded_overrides(folder)
    _run(prepared_study(files.study_file, overrides), tuple(overrides))


def status(
    folder: Folder, as_json: AsJson = False, address: OnCluster = None, insecure: Insecure = False
) -> None:
    """How far a study is; with --address, how the job of the study of that name is."""
    from orchestrator.persistence.lock import is_running
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.service.status import Status, line

    if address is not None:
        job_status(str(folder), address, insecure, as_json)
        return
    found = read_json(StudyFolder(folder).status)
    running = is_running(folder)
    if as_json:
        print_json({**found, "process": "running" if running else "stopped"})
        return
    current = Status(**found)
    ended = current.ended
    stage = "" if current.stage == "done" else f", {current.stage}"
    state = "running" if running else ("done" if current.stage == "done" else "stopped; resume goes on")
    stdout_console().print(
        f"{current.study}: {state}{stage}, {ended}/{current.candidates + 1} ended, {line(current)}"
    )
    for one in current.bill if current.spent else ():
        stdout_console().print(f"  {one}", soft_wrap=True, markup=False, highlight=False)


def front(
    folder: FolderOrPlace,
    as_json: AsJson = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Show the Pareto front of a study, finished or not, beside the original; of one in a bucket, when it has ended."""
    found = _front(folder if address is None else remote_location(folder, address, insecure))
    if as_json:
        print_json(found)
        return
    metrics = [objective["metric"] for objective in found["objectives"]]
    table = Table("id", *metrics, "recipe", title=f"Pareto front of {found['study']}", title_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    original = found["original"]
    table.add_row("original", *front_cells(original, metrics, None), "", style="bold", end_section=True)
    for member in found["members"]:
        table.add_row(member["id"][:8], *front_cells(member, metrics, original), member["recipe"])
    if any(member.get("differences", {}).keys() & {*metrics} for member in found["members"]):
        table.caption = (
            "in brackets: against the original, item by item of the evaluation, ± the standard error"
        )
    stdout_console().print(table)


def report(
    folder: FolderOrPlace,
    open_it: Annotated[bool, typer.Option("--open")] = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Tell where the report of a study lies (and open it in a browser); one in a bucket is written to NAME.html."""
    page = _report(folder if address is None else remote_location(folder, address, insecure))
    stdout_console().print(str(page), soft_wrap=True, markup=False, highlight=False)
    if open_it:
        typer.launch(str(page))


def _run(prepared: PreparedStudy, overrides: tuple[str, ...]) -> None:
    from cluster.executors.executor import ExecutorUnavailableError
    from cluster.storage.open import is_remote
    from jobs.failures import disk_is_full
    from orchestrator.service.launch import OtherStudyError, launch
    from orchestrator.service.status import Display

    try:
        with Display(stderr_console()) as display:
            results = launch(prepared, display.show, overrides)
    except KeyboardInterrupt:
        stderr_console().print(
            f"Interrupted. What ended is kept; go on with: {_resuming(prepared)}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    except BlockingIOError:
        fail(f"another process runs the study in {prepared.folder}; see slimfront status {prepared.folder}")
    except OtherStudyError as error:
        fail(str(error))
    except ExecutorUnavailableError as error:
        fail(f"{error}. What ended is kept; go on with: {_resuming(prepared)}")
    except (OSError, sqlite3.Error) as error:
        if not disk_is_full(error):
            raise
        freed = f" (slimfront store {prepared.folder.home} --trim 5GB removes what can be made again)"
        fail(
            f"The disk with {prepared.folder} is full. What ended is kept. Make room"
            f"{'' if is_remote(prepared.config.store) else freed}, then go on with: {_resuming(prepared)}"
        )
    if results.original.failure is not None:
        stderr_console().print(
            f"The original could not be measured: {results.original.failure.message}", style="red"
        )
        raise typer.Exit(1)
    if results.original.measurement is None:
        print_failures(prepared.folder.path, results)
        stderr_console().print("Nothing was measured, the original neither.", style="red")
        raise typer.Exit(1)
    front(str(prepared.folder))
    _publish(prepared, results)
    print_failures(prepared.folder.path, results)
    stderr_console().print(f"Report: {prepared.folder.path / 'report.html'}")
    if not results.members:
        raise typer.Exit(1)


def _resuming(prepared: PreparedStudy) -> str:
    """The command that goes on with a study: by its name where it is a cluster's job, whose folder is the cluster's."""
    from cluster.on_ray.jobs_api import in_job

    if in_job():
        return f"slimfront resume {prepared.config.name} --address URL"
    return f"slimfront resume {prepared.folder}"


def _report(place: str) -> Path:
    """The report of a study's folder, or that of one in a bucket, written here."""
    from cluster.storage.open import is_remote
    from orchestrator.persistence.atomic_files import write_whole
    from orchestrator.persistence.published import published_report
    from orchestrator.persistence.study_folder import StudyFolder

    if is_remote(place):
        page = Path(f"{place.partition('?')[0].rpartition('/')[2]}.html")
        try:
            write_whole(page, published_report(place))
        except (LookupError, OSError, ValueError) as error:
            fail(error_message(error))
        return page
    page = StudyFolder(Path(place)).report
    if not page.is_file():
        fail(f"{page} is not there: it is written when a search ends")
    return page


def _front(place: str) -> dict[str, Any]:
    from cluster.storage.open import is_remote
    from orchestrator.persistence.published import published
    from orchestrator.persistence.study_folder import StudyFolder

    if not is_remote(place):
        return read_json(StudyFolder(Path(place)).front)
    try:
        return published(place)
    except (LookupError, OSError, ValueError) as error:
        fail(error_message(error))


def _publish(prepared: PreparedStudy, results: Results) -> None:
    from orchestrator.persistence.published import publish
    from orchestrator.study.results import front_json

    try:
        page = prepared.folder.report.read_text(encoding="utf-8")
        publish(prepared.config.store, prepared.config.name, front_json(results), page)
    except OSError as error:
        said = f"The front is here, and not in the store: {error}. slimfront resume {prepared.folder} puts it there"
        stderr_console().print(said, soft_wrap=True, markup=False)
