"""Commands about clusters: submit, logs, stop, init, up, doctor."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import (
    CLUSTER_HELP,
    Cluster,
    ExitCode,
    Insecure,
    Name,
    Overrides,
    StudyFile,
    exit_on_error,
    fail,
    print_problems,
    refuse,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.remote import connect_cluster, find_job, follow_job, print_submission
from orchestrator.cli.tables import show_findings

if TYPE_CHECKING:
    from cluster.doctor import Fact
    from cluster.local_services import ServiceUrls


def submit(
    study: StudyFile,
    address: Cluster,
    overrides: Overrides = None,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the log until the job ends or Ctrl-C.")
    ] = True,
) -> None:
    """Run a study on a cluster, with its local files. If it runs already, follow it; if it has stopped, resume it."""
    from orchestrator.config.load import load
    from orchestrator.service.study_package import study_package
    from orchestrator.service.submission import submit as submit_package

    with exit_on_error():
        loaded = load(study, overrides or [])
    if loaded.problems:
        refuse([loaded.located(problem) for problem in loaded.problems])
    with connect_cluster(address, insecure) as jobs:
        with exit_on_error(ValueError, code=ExitCode.INVALID_INPUT):
            package = study_package(loaded, overrides or [], jobs.on_this_machine())
            submitted = submit_package(package, jobs)
        id = print_submission(submitted)
        if follow:
            follow_job(jobs, id)


def logs(
    name: Name,
    address: Cluster,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until the study ends or Ctrl-C.")
    ] = False,
) -> None:
    """Show the log of a study on a cluster."""
    with connect_cluster(address, insecure) as jobs:
        job = find_job(jobs, name)
        if follow:
            follow_job(jobs, job.id)
        else:
            typer.echo(jobs.log(job.id), nl=False)


def stop(name: Name, address: Cluster, insecure: Insecure = False) -> None:
    """Stop a study on a cluster. Completed work is kept; submit it again to resume."""
    with connect_cluster(address, insecure) as jobs:
        job = jobs.stop(find_job(jobs, name).id)
        stdout_console().print(f"{job.id}: {job.status.lower()}", soft_wrap=True, markup=False)
        if not job.ended:
            fail(f"{job.id} did not stop within 15 s; see slimfront status {name}")


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write, created if it does not exist.")
    ],
    template: Annotated[str, typer.Option(help="Kind of cluster: aws, gcp or kuberay.")],
    name: Annotated[str, typer.Option(help="Name of the cluster.")] = "slimfront",
    image: Annotated[
        str | None,
        typer.Option(help="Path of the image in its registry; default slimfront:VERSION."),
    ] = None,
    max_workers: Annotated[int, typer.Option(help="Maximum number of nodes, without the head.")] = 4,
    region: Annotated[
        str | None, typer.Option(help="Region; default us-east-1 on aws, us-central1 on gcp.")
    ] = None,
    zone: Annotated[str | None, typer.Option(help="Zone on gcp; default the region's zone a.")] = None,
    project: Annotated[str | None, typer.Option(help="Project on gcp; required there.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU on aws and gcp: L4 (default), T4 …")] = None,
) -> None:
    """Write the files of an autoscaling cluster, for Ray's cluster launcher or for KubeRay, and a Dockerfile."""
    from cluster.templates import filling

    choices = filling.Choices(name, image, max_workers, region, zone, project, gpu)
    try:
        contents = filling.fill(template, choices)
    except ValueError as error:
        refuse(str(error).splitlines())
    with exit_on_error(OSError):
        written = filling.write(contents, folder)
    for path in written:
        stdout_console().print(str(path), soft_wrap=True)
    stdout_console().print("The first lines of each file say what to do before its first use.")


def up(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of MLflow's database.")] = Path(
        "runs"
    ),
    dashboard_port: Annotated[
        int, typer.Option(help="Port of Ray's dashboard, which accepts studies.")
    ] = 8265,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
) -> None:
    """Run a Ray head and an MLflow server on this machine until Ctrl-C, to submit studies to."""
    from cluster import local_services

    def show(ready: Mapping[str, bool]) -> None:
        states = {name: "ready" if is_ready else "starting" for name, is_ready in ready.items()}
        waiting.update(", ".join(f"{name} {state}" for name, state in states.items()))

    err = stderr_console()
    err.print("Starting Ray and MLflow; MLflow needs up to 40 s to create a new database.")
    waiting = err.status("")
    ports = local_services.Ports(dashboard_port, mlflow_port)
    try:
        with (
            exit_on_error(OSError, ValueError),
            _interrupted_by_signals(),
            waiting,
            local_services.up(folder, ports, show) as services,
        ):
            waiting.stop()
            _print_service_urls(services.urls)
            services.watch()
    except KeyboardInterrupt:
        err.print("Ray and MLflow have stopped; MLflow's data is kept.")


def doctor(
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check a file of Ray's cluster launcher or of KubeRay instead."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Check a cluster instead. {CLUSTER_HELP}.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Check a store instead: a folder, or s3://bucket/prefix."),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Check this machine, a cluster, a store, or the file of a cluster, and report problems."""
    if template is not None:
        _check_template(template)
    if address is not None or store is not None:
        from cluster import doctor as checks

        facts: list[Fact] = []
        if address is not None:
            facts += checks.of_cluster(address, insecure)
        if store is not None:
            facts += checks.of_store(store)
        show_findings(facts)
    elif template is None:
        from orchestrator.cli.doctor_checks import diagnose

        show_findings(diagnose())


def _print_service_urls(urls: ServiceUrls) -> None:
    lines = [f"Ray     {urls.dashboard}", f"MLflow  {urls.mlflow}", "", "In another terminal:"]
    if urls.token_file is not None:
        lines.append(f"  export RAY_AUTH_TOKEN_PATH={shlex.quote(str(urls.token_file))}")
    lines += [
        f"  slimfront submit STUDY.yaml --address {urls.dashboard} tracking.uri={urls.mlflow}",
        f"  slimfront status NAME --address {urls.dashboard}",
        "",
        "Ctrl-C ends both and stops running studies; submit them again to resume.",
    ]
    for line in lines:
        stdout_console().print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too, and ignore further signals while the command ends."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_template(file: Path) -> None:
    from cluster.templates.checking import check

    with exit_on_error(OSError), exit_on_error(ValueError, code=ExitCode.INVALID_INPUT):
        lines = check(file)
    problems = [line.text for line in lines if line.certain]
    print_problems(problems)
    for line in lines:
        if not line.certain:
            stderr_console().print(
                f"{line.text} (warning)", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    if problems:
        raise typer.Exit(ExitCode.INVALID_INPUT)
    stdout_console().print(f"{file} is valid, as far as can be checked without the cloud", soft_wrap=True)
