"""Studies that run as jobs on a cluster: find a job, follow its log, print its status."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.console import ExitCode, exit_on_error, stderr_console, stdout_console
from orchestrator.cli.tables import print_json

if TYPE_CHECKING:
    from cluster.on_ray.jobs_api import Jobs, JobState
    from orchestrator.service.submission import Attach, Start


@contextmanager
def connect_cluster(address: str, insecure: bool) -> Iterator[Jobs]:
    """Open the jobs of a cluster. Its errors end the command."""
    from cluster.on_ray.jobs_api import Jobs

    with exit_on_error(LookupError, OSError, RuntimeError, ValueError):
        yield Jobs(address, insecure)


def find_job(jobs: Jobs, name: str) -> JobState:
    from orchestrator.service.submission import latest

    return latest(name, jobs.all())


def print_submission(submitted: Attach | Start) -> str:
    """Print whether a study was started on a cluster, and return the id of its job."""
    from orchestrator.service.submission import Start

    if isinstance(submitted, Start):
        id = submitted.id
        message = f"{id} was submitted"
        if submitted.resumed is not None:
            message += f"; it resumes where {submitted.resumed.id} stopped"
    else:
        id = submitted.job.id
        message = f"{id} is {submitted.job.status.lower()} already"
    stderr_console().print(message, soft_wrap=True, markup=False, highlight=False)
    return id


def follow_job(jobs: Jobs, id: str) -> None:
    """Print a job's log until the job ends. A job that does not succeed ends the command with NO_RESULT."""
    interrupted = f"{id} continues; slimfront logs {id} -f shows its log again, slimfront stop {id} stops it"
    with exit_on_error(interrupted=interrupted):
        state = jobs.follow(id, lambda text: typer.echo(text, nl=False))
    stderr_console().print(f"{id}: {state.status.lower()}", soft_wrap=True, markup=False)
    if state.status != "SUCCEEDED":
        stderr_console().print(_first_line(state.message), soft_wrap=True, markup=False)
        raise typer.Exit(ExitCode.NO_RESULT)


def job_status(name: str, address: str, insecure: bool, as_json: bool) -> None:
    """Print the status of a study's job and the last line of its log."""
    with connect_cluster(address, insecure) as jobs:
        job = find_job(jobs, name)
        log = jobs.log(job.id).rstrip().splitlines()
    last_line = log[-1] if log else ""
    if as_json:
        print_json({**dataclasses.asdict(job), "last_line": last_line})
        return
    out = stdout_console()
    status = f"{name}: {job.status.lower()} as {job.id}. {_first_line(job.message)}"
    out.print(status, soft_wrap=True, markup=False)
    if last_line:
        out.print(last_line, soft_wrap=True, markup=False, highlight=False)


def remote_location(name: str, address: str, insecure: bool) -> str:
    """Return the location of the published front of a study on a cluster."""
    from orchestrator.service.submission import front_location

    with connect_cluster(address, insecure) as jobs:
        return front_location(find_job(jobs, name))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
