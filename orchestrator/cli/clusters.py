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
    Insecure,
    Name,
    Overrides,
    StudyFile,
    fail,
    print_problems,
    refuse,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.remote import connect_cluster, find_job, follow_job, print_submission
from orchestrator.cli.tables import show_findings

if TYPE_CHECKING:
    from cluster.local_services import ServiceUrls


def submit(
    study: StudyFile,
    address: Cluster,
    overrides: Overrides = None,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show what it writes, until it ends or Ctrl-C.")
    ] = True,
) -> None:
    """Run a study on a cluster, with the local files that it names. Submitted again, it is followed, or goes on."""
    from orchestrator.config.load import load
    from orchestrator.config.problems import InvalidStudyError
    from orchestrator.service import submission

    try:
        loaded = load(study, overrides or [])
    except InvalidStudyError as error:
        refuse(error.lines)
    if loaded.problems:
        refuse([loaded.located(problem) for problem in loaded.problems])
    with connect_cluster(address, insecure) as jobs:
        try:
            submitted = submission.submission(loaded, overrides or [], jobs.on_this_machine())
            done = submission.submit(submitted, jobs)
        except ValueError as error:
            refuse([str(error)])
        id = print_submission(done)
        if follow:
            follow_job(jobs, id)


def logs(
    name: Name,
    address: Cluster,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the study ends or Ctrl-C.")
    ] = False,
) -> None:
    """Show what a study on a cluster wrote."""
    with connect_cluster(address, insecure) as jobs:
        job = find_job(jobs, name)
        if follow:
            follow_job(jobs, job.id)
        else:
            typer.echo(jobs.log(job.id), nl=False)


def stop(name: Name, address: Cluster, insecure: Insecure = False) -> None:
    """Stop a study on a cluster. What ended is kept; submitted again, it goes on."""
    with connect_cluster(address, insecure) as jobs:
        job = jobs.stop(find_job(jobs, name).id)
        stdout_console().print(f"{job.id}: {job.status.lower()}", soft_wrap=True, markup=False)
        if not job.ended:
            fail(f"{job.id} was told to stop and has not yet; look again with slimfront status {name}")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them; made if need be.")],
    template: Annotated[str, typer.Option(help="aws, gcp or kuberay.")],
    name: Annotated[str, typer.Option(help="The cluster's.")] = "slimfront",
    image: Annotated[
        str | None, typer.Option(help="Where nodes will pull what the Dockerfile makes; slimfront:VERSION.")
    ] = None,
    max_workers: Annotated[int, typer.Option(help="The most nodes beside the head.")] = 4,
    region: Annotated[str | None, typer.Option(help="us-east-1 on aws, us-central1 on gcp.")] = None,
    zone: Annotated[str | None, typer.Option(help="Of gcp; the region's a.")] = None,
    project: Annotated[str | None, typer.Option(help="Of gcp, where it must be given.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The kind, on aws and gcp: L4 (the default), T4 …")] = None,
) -> None:
    """Write the files of an autoscaling cluster: for Ray's launcher on a cloud, or for KubeRay; and a Dockerfile."""
    from cluster.templates import filling

    choices = filling.Choices(name, image, max_workers, region, zone, project, gpu)
    try:
        contents = filling.fill(template, choices)
    except ValueError as error:
        refuse(str(error).splitlines())
    try:
        written = filling.write(contents, folder)
    except OSError as error:
        fail(str(error))
    for path in written:
        stdout_console().print(str(path), soft_wrap=True)
    stdout_console().print("The head of each file says what to do before its first use.")


def up(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where MLflow's database lies.")] = Path(
        "runs"
    ),
    dashboard_port: Annotated[int, typer.Option(help="Of Ray's dashboard, which takes studies.")] = 8265,
    mlflow_port: Annotated[int, typer.Option(help="Of MLflow's server.")] = 5000,
) -> None:
    """Run a Ray head and an MLflow server for this machine alone, until Ctrl-C, to submit studies to."""
    from cluster import local_services

    def show(ready: Mapping[str, bool]) -> None:
        waiting.update(", ".join(f"{name} {'answers' if ok else 'starts'}" for name, ok in ready.items()))

    err = stderr_console()
    err.print("Starting Ray and MLflow; a new database takes MLflow up to 40 s.")
    waiting = err.status("")
    try:
        with (
            _ending_by_signals(),
            waiting,
            local_services.up(folder, local_services.Ports(dashboard_port, mlflow_port), show) as both,
        ):
            waiting.stop()
            _tell_what_is_up(both.urls)
            both.watch()
    except KeyboardInterrupt:
        err.print("Ray and MLflow have ended; what MLflow holds is kept.")
    except (OSError, ValueError) as error:
        fail(str(error))


def doctor(
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check this instead: a file of Ray's launcher or of KubeRay."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Look at this cluster instead. {CLUSTER_HELP}.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Try this store instead: a folder, or s3://bucket/prefix."),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Tell what this machine, a cluster or a store can do and what is missing, or what is wrong in a cluster's file."""
    if template is not None:
        _check_template(template)
    if address is not None or store is not None:
        from cluster import doctor as looking

        found = looking.of_cluster(address, insecure) if address is not None else iter(())
        show_findings([*found, *(looking.of_store(store) if store is not None else ())])
    elif template is None:
        from orchestrator.cli.doctor_checks import diagnose

        show_findings(diagnose())


def _tell_what_is_up(place: ServiceUrls) -> None:
    out = stdout_console()
    said = [f"Ray     {place.dashboard}", f"MLflow  {place.mlflow}", "", "In another terminal:"]
    if place.token_file is not None:
        said.append(f"  export RAY_AUTH_TOKEN_PATH={shlex.quote(str(place.token_file))}")
    said.append(f"  slimfront submit STUDY.yaml --address {place.dashboard} tracking.uri={place.mlflow}")
    said.append(f"  slimfront status NAME --address {place.dashboard}")
    for line in [*said, "", "Ctrl-C ends both, and studies that run; submitted again, they go on."]:
        out.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Let SIGTERM and a terminal that is closed end a command as Ctrl-C does: once, since it takes a while."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _check_template(file: Path) -> None:
    from cluster.templates.checking import check

    try:
        lines = check(file)
    except OSError as error:
        fail(str(error))
    except ValueError as error:
        refuse([str(error)])
    wrong = [line.text for line in lines if line.certain]
    print_problems(wrong)
    for line in lines:
        if not line.certain:
            stderr_console().print(
                f"{line.text} (warning)", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    if wrong:
        raise typer.Exit(2)
    stdout_console().print(f"{file} is valid, as far as can be told without asking the cloud", soft_wrap=True)
