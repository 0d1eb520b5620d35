"""Studies that run as jobs on a cluster: find one, follow its log."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.console import error_message, fail, stderr_console, stdout_console
from orchestrator.cli.tables import print_json

if TYPE_CHECKING:
    from cluster.on_ray.jobs_api import Jobs, JobState
    from orchestrator.service.submission import Attach, Start


@contextmanager
def connect_cluster(address: str, insecure: bool) -> Iterator[Jobs]:
    """The jobs of a cluster; what fails there is one line."""
    from cluster.on_ray.jobs_api import Jobs

    try:
        yield Jobs(address, insecure)
    except (LookupError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, typer.Exit):
            raise
        fail(error_message(error))


def find_job(jobs: Jobs, name: str) -> JobState:
    from orchestrator.service.submission import latest

    return latest(name, jobs.all())


def print_submission(done: Attach | Start) -> str:
    """Tell whether a study was started on a cluster; returns its job's id."""
    from orchestrator.service.submission import Start

    if isinstance(done, Start):
        id, after = done.id, f", to go on where {done.again.id} ended" if done.again else ""
        said = f"{id} was submitted{after}"
    else:
        id, said = done.job.id, f"{done.job.id} is {done.job.status.lower()} already"
    stderr_console().print(said, soft_wrap=True, markup=False, highlight=False)
    return id


def follow_job(jobs: Jobs, id: str) -> None:
    """Show a job's log until it ends; exit code 1 where it did not succeed."""
    try:
        state = jobs.follow(id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        said = f"{id} goes on; slimfront logs {id} -f follows it again, slimfront stop {id} ends it"
        stderr_console().print(said, soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
    stderr_console().print(f"{id}: {state.status.lower()}", soft_wrap=True, markup=False)
    if state.status != "SUCCEEDED":
        stderr_console().print(
            state.message.splitlines()[0] if state.message else "", soft_wrap=True, markup=False
        )
        raise typer.Exit(1)


def job_status(name: str, address: str, insecure: bool, as_json: bool) -> None:
    with connect_cluster(address, insecure) as jobs:
        job = find_job(jobs, name)
        written = jobs.log(job.id).rstrip().splitlines()
    if as_json:
        print_json({**dataclasses.asdict(job), "last_line": written[-1] if written else ""})
        return
    message = job.message.splitlines()[0] if job.message else ""
    stdout_console().print(
        f"{name}: {job.status.lower()} as {job.id}. {message}", soft_wrap=True, markup=False
    )
    if written:
        stdout_console().print(written[-1], soft_wrap=True, markup=False, highlight=False)


def remote_location(name: str, address: str, insecure: bool) -> str:
    from orchestrator.service.submission import front_location

    with connect_cluster(address, insecure) as jobs:
        return front_location(find_job(jobs, name))
