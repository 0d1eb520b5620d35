"""The command `slimfront`: thin; every decision lies elsewhere.

Exit codes: 0 done; 1 it ran and the result is not what was hoped for (nothing measured, original failed);
2 the input is wrong, nothing was started; 3 something is not as it must be (folder of another study,
already running, missing); 130 interrupted, `slimfront resume` goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from cluster.doctor import Fact
    from cluster.local import Place
    from cluster.submit import Jobs, JobState
    from orchestrator.catalogue import Entry
    from orchestrator.diagnosis import Finding
    from orchestrator.prepare import Prepared
    from orchestrator.results import Results
    from orchestrator.submission import Attach, Start
    from orchestrator.trim import Inventory, Item

app = typer.Typer(
    help="Find the Pareto front of smaller language models, measured on the files you would ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tracking_app = typer.Typer(help="The mirror of studies in MLflow.", no_args_is_help=True)
app.add_typer(tracking_app, name="tracking")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its keys.")
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A study's folder, such as runs/quickstart.")]
FolderOrPlace = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER", help="A study's folder, such as runs/quickstart, or s3://bucket/prefix/NAME."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name, or its job's id.")]
_CLUSTER = "A cluster's dashboard, such as http://head:8265"
Cluster = Annotated[str, typer.Option("--address", envvar="RAY_ADDRESS", metavar="URL", help=f"{_CLUSTER}.")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help=f"{_CLUSTER}: NAME is asked for there, and no folder here."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Also talk to a cluster that lets anybody in, without a token.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """The entry point of the `slimfront` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


@app.command()
def validate(study: StudyFile, overrides: Overrides = None) -> None:
    """Check a study and report all that is wrong with it. Starts nothing."""
    prepared = _prepared(study, overrides)
    _out().print(
        f"{study} is valid: {prepared.config.name}, {len(prepared.space.stages)} stages, "
        f"{len(prepared.space.knobs())} knobs, original {_mb(prepared.plan.original_cost.size_bytes)}"
    )


@app.command()
def plan(study: StudyFile, overrides: Overrides = None) -> None:
    """Show what a search would do: jobs, what they share, exact sizes, time. Runs nothing."""
    from cluster.store import open_store
    from orchestrator import search
    from orchestrator.forecast import costs, forecast
    from orchestrator.prepare import slots_of

    prepared = _prepared(study, overrides)
    config = prepared.config
    knobs = prepared.space.knobs()
    searching = search.make(
        config.search.algorithm, knobs, prepared.plan.objectives, prepared.known, config.search.seed,
        prepared.opening(),
    )  # fmt: skip
    found = forecast(prepared, searching, open_store(config.store))
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
    slots = slots_of(config)
    source = "from what ran here before" if found.measured else "guessed from the count of operations"
    out = _out()
    out.print(table)
    out.print(
        f"{len(found.proposals)} candidates, {found.steps} steps, {found.jobs} of them distinct "
        f"({found.steps - found.jobs} shared), {found.found} in the store already.\n"
        f"About {found.seconds / slots / 60:.1f} minutes on {slots} slots ({source}). Sizes are exact; "
        f"the original has {_mb(original)}.\n"
        f"Saved: about {found.shared_seconds / slots / 60:.1f} minutes by shared steps, "
        f"{found.found_seconds / slots / 60:.1f} by what is in the store; statistics of shared models come on top."
    )
    for line in costs(prepared, found):
        out.print(line, soft_wrap=True, markup=False, highlight=False)


@app.command()
def search(study: StudyFile, overrides: Overrides = None) -> None:
    """Run a study. Run again, it goes on where it was left; nothing that ended is done twice."""
    _run(_prepared(study, overrides), tuple(overrides or ()))


@app.command()
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
    from orchestrator import submission
    from orchestrator.config import InvalidStudy, load

    try:
        loaded = load(study, overrides or [])
    except InvalidStudy as error:
        _refuse(error.lines)
    if loaded.problems:
        _refuse([loaded.located(problem) for problem in loaded.problems])
    with _cluster(address, insecure) as jobs:
        try:
            submitted = submission.submission(loaded, overrides or [], jobs.on_this_machine())
            done = submission.submit(submitted, jobs)
        except ValueError as error:
            _refuse([str(error)])
        id = _tell_what_was_done(done)
        if follow:
            _follow(jobs, id)


@app.command()
def logs(
    name: Name,
    address: Cluster,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the study ends or Ctrl-C.")
    ] = False,
) -> None:
    """Show what a study on a cluster wrote."""
    with _cluster(address, insecure) as jobs:
        job = _job(jobs, name)
        if follow:
            _follow(jobs, job.id)
        else:
            typer.echo(jobs.log(job.id), nl=False)


@app.command()
def stop(name: Name, address: Cluster, insecure: Insecure = False) -> None:
    """Stop a study on a cluster. What ended is kept; submitted again, it goes on."""
    with _cluster(address, insecure) as jobs:
        job = jobs.stop(_job(jobs, name).id)
        _out().print(f"{job.id}: {job.status.lower()}", soft_wrap=True, markup=False)
        if not job.ended:
            _fail(f"{job.id} was told to stop and has not yet; look again with slimfront status {name}")


@app.command()
def resume(folder: Folder, address: OnCluster = None, insecure: Insecure = False) -> None:
    """Go on with an interrupted study, from its folder alone, or with --address by its name on a cluster."""
    from orchestrator import submission

    if address is not None:
        with _cluster(address, insecure) as jobs:
            _tell_what_was_done(submission.resume(str(folder), jobs))
        return
    if not (folder / "ledger.db").is_file():
        _fail(f"{folder} holds no study: there is no ledger.db in it")
    overrides = _overrides(folder)
    _run(_prepared(folder / "study.yaml", overrides), tuple(overrides))


@app.command()
def status(
    folder: Folder, as_json: AsJson = False, address: OnCluster = None, insecure: Insecure = False
) -> None:
    """How far a study is; with --address, how the job of the study of that name is."""
    from orchestrator.lock import is_running
    from orchestrator.progress import Status, line

    if address is not None:
        _job_status(str(folder), address, insecure, as_json)
        return
    found = _read_json(folder / "status.json")
    running = is_running(folder)
    if as_json:
        _print_json({**found, "process": "running" if running else "stopped"})
        return
    current = Status(**found)
    ended = current.ended
    stage = "" if current.stage == "done" else f", {current.stage}"
    state = "running" if running else ("done" if current.stage == "done" else "stopped; resume goes on")
    _out().print(f"{current.study}: {state}{stage}, {ended}/{current.candidates + 1} ended, {line(current)}")
    for one in current.bill if current.spent else ():
        _out().print(f"  {one}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def front(
    folder: FolderOrPlace,
    as_json: AsJson = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Show the Pareto front of a study, finished or not, beside the original; of one in a bucket, when it has ended."""
    found = _front(folder if address is None else _place(folder, address, insecure))
    if as_json:
        _print_json(found)
        return
    metrics = [objective["metric"] for objective in found["objectives"]]
    table = Table("id", *metrics, "recipe", title=f"Pareto front of {found['study']}", title_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    original = found["original"]
    table.add_row("original", *_cells(original, metrics, None), "", style="bold", end_section=True)
    for member in found["members"]:
        table.add_row(member["id"][:8], *_cells(member, metrics, original), member["recipe"])
    if any(member.get("differences", {}).keys() & {*metrics} for member in found["members"]):
        table.caption = (
            "in brackets: against the original, item by item of the evaluation, ± the standard error"
        )
    _out().print(table)


@app.command()
def report(
    folder: FolderOrPlace,
    open_it: Annotated[bool, typer.Option("--open")] = False,
    address: OnCluster = None,
    insecure: Insecure = False,
) -> None:
    """Tell where the report of a study lies (and open it in a browser); one in a bucket is written to NAME.html."""
    page = _report(folder if address is None else _place(folder, address, insecure))
    _out().print(str(page), soft_wrap=True, markup=False, highlight=False)
    if open_it:
        typer.launch(str(page))


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, new or empty.")],
    pick: Annotated[
        str, typer.Option(help="knee, smallest, fastest, most-accurate, or the start of a member's id.")
    ] = "knee",
    format: Annotated[
        str | None, typer.Option(help="The form to write; without it, the one that the study's target runs.")
    ] = None,
) -> None:
    """Write a member of the front to ship, with a model card, its recipe, its measurement and checksums."""
    from orchestrator.export import export_member

    try:
        member = export_member(folder, pick, out, format)
    except (ImportError, LookupError, OSError, ValueError) as error:
        _fail(_said(error))
    _out().print(f"{member['id']} → {out}\n{member['recipe']}")


Exported = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `slimfront export` wrote.")]


@app.command()
def verify(folder: Exported, as_json: AsJson = False) -> None:
    """Measure an export again, beside what was recorded; exit code 1 where they differ by more than the errors."""
    from orchestrator.verify import verify as measured_again

    try:
        found = measured_again(folder)
    except (ImportError, LookupError, OSError, ValueError) as error:
        _fail(_said(error))
    if as_json:
        _print_json([{**dataclasses.asdict(one), "ok": one.ok} for one in found])
    else:
        table = Table(
            "metric", "recorded", "measured", "may differ by", "", title=str(folder), title_justify="left"
        )
        for one in found:
            allowed = "–" if one.allowed is None else f"{one.allowed:.3g}"
            state = one.note or ("✓" if one.ok else "[red]✗ differs by more[/]")
            table.add_row(one.metric, f"{one.recorded:.6g}", f"{one.measured:.6g}", allowed, state)
        _out().print(table)
    if not all(one.ok for one in found):
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="What `slimfront export` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another export, of any form.")],
    pairs: Annotated[
        int, typer.Option(min=1, help="How often each is timed, in turns: 6 make 95 % sure.")
    ] = 6,
    as_json: AsJson = False,
) -> None:
    """Compare two exports: quality on the same items, times in turns, so that drift and hard texts drop out."""
    from orchestrator.compare import compare as compared

    try:
        found = compared(first, second, pairs)
    except (ImportError, LookupError, OSError, ValueError) as error:
        _fail(_said(error))
    if as_json:
        _print_json([dataclasses.asdict(one) for one in found])
        return
    table = Table("metric", str(first), str(second), "second against first", "")
    for one in found:
        time = one.metric.endswith("_ms")
        against = f"× {one.against:.3f}" if time else f"{one.against:+.4g}"
        bounds = "" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}, {one.confidence:.0%} sure"
        table.add_row(one.metric, f"{one.first:.6g}", f"{one.second:.6g}", against, bounds)
    _out().print(table)


@app.command()
def chat(
    folder: Exported,
    prompt: Annotated[
        str | None, typer.Option(help="Say this and end; without it, ask again and again.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most to write for one answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="To run on.")] = os.cpu_count() or 1,
) -> None:
    """Let an export write text, in its runtime."""
    from orchestrator.chat import Chat

    try:
        talking = Chat(folder, threads)
    except (ImportError, LookupError, OSError, ValueError) as error:
        _fail(_said(error))
    if prompt is None:
        _err().print(f"{folder} in {talking.runtime}; an empty line ends it")
    while True:
        said = (
            prompt
            if prompt is not None
            else typer.prompt(">", default="", show_default=False, prompt_suffix=" ")
        )
        if not said.strip():
            return
        for piece in talking.reply(said, tokens, temperature, seed):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        if prompt is not None:
            return


@app.command()
def techniques(
    name: Annotated[str | None, typer.Argument(help="One of them, to see all there is to it.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the techniques, or show one: what it is, needs and works on, its options, what it refuses and why."""
    from jobs import techniques as known
    from orchestrator import catalogue

    try:
        entries = catalogue.entries(known.names() if name is None else [name])
    except LookupError as error:
        _fail(str(error))
    if as_json:
        _print_json([dataclasses.asdict(entry) for entry in entries])
    elif name is None:
        table = Table("name", "kind", "works on", "leaves", "needs", "refuses")
        for entry in entries:
            table.add_row(
                entry.name, entry.kind, *map(", ".join, (entry.works_on, entry.leaves, entry.needs)),
                ", ".join(model for models in entry.refusals().values() for model in models),
            )  # fmt: skip
        _out().print(table)
        _out().print("slimfront techniques NAME shows one with its options, its paper and why it refuses.")
    else:
        _show_technique(entries[0])


@app.command()
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
        _refuse(str(error).splitlines())
    try:
        written = filling.write(contents, folder)
    except OSError as error:
        _fail(str(error))
    for path in written:
        _out().print(str(path), soft_wrap=True)
    _out().print("The head of each file says what to do before its first use.")


@app.command()
def up(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where MLflow's database lies.")] = Path(
        "runs"
    ),
    dashboard_port: Annotated[int, typer.Option(help="Of Ray's dashboard, which takes studies.")] = 8265,
    mlflow_port: Annotated[int, typer.Option(help="Of MLflow's server.")] = 5000,
) -> None:
    """Run a Ray head and an MLflow server for this machine alone, until Ctrl-C, to submit studies to."""
    from cluster import local

    def show(ready: Mapping[str, bool]) -> None:
        waiting.update(", ".join(f"{name} {'answers' if ok else 'starts'}" for name, ok in ready.items()))

    err = _err()
    err.print("Starting Ray and MLflow; a new database takes MLflow up to 40 s.")
    waiting = err.status("")
    try:
        with (
            _ending_by_signals(),
            waiting,
            local.up(folder, local.Ports(dashboard_port, mlflow_port), show) as both,
        ):
            waiting.stop()
            _tell_what_is_up(both.place)
            both.watch()
    except KeyboardInterrupt:
        err.print("Ray and MLflow have ended; what MLflow holds is kept.")
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command()
def doctor(
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check this instead: a file of Ray's launcher or of KubeRay."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Look at this cluster instead. {_CLUSTER}.")
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
        _show_findings([*found, *(looking.of_store(store) if store is not None else ())])
    elif template is None:
        from orchestrator.diagnosis import diagnose

        _show_findings(diagnose())


def _show_findings(findings: Sequence[Finding | Fact]) -> None:
    table = Table("what", "found", "what to do")
    for finding in findings:
        mark = "" if finding.ok else "[red]✗[/] "
        table.add_row(finding.what, mark + escape(finding.value), escape(finding.hint))
    _out().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def store(
    place: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="What `store:` of a study names, such as runs or s3://bucket/prefix."
        ),
    ],
    trim: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Remove what can be made again until no more is left: 5GB."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Remove what killed writers left over a day ago, and checkpoints as old."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a store holds, and trim it: fronts, originals and results stay, all else can be made again."""
    from cluster.store import is_remote
    from orchestrator import trim as trimming

    if trim is not None and is_remote(place):
        _fail("a bucket is not trimmed: studies on other machines may need what it holds; --sweep is safe")
    try:
        limit = None if trim is None else trimming.bytes_of(trim)
        swept = trimming.sweep(place) if sweep and not dry_run else 0
        held = trimming.found(place)
        beyond = [] if limit is None else held.beyond(limit)
        gone = beyond if dry_run else trimming.remove(beyond)
    except (LookupError, OSError, ValueError) as error:
        _fail(_said(error))
    left = trimming.found(place).size_bytes if gone and not dry_run else held.size_bytes
    if as_json:
        told = {"size_bytes": left, "swept_bytes": swept, "dry_run": dry_run}
        _print_json({**trimming.summary(held, gone), **told})
    else:
        _show_store(held, gone, None if limit is None else "would go" if dry_run else "removed")
        hint = f"; what may go is made again when needed: slimfront store {place} --trim 5GB leaves no more than that"
        if is_remote(place):
            hint = f"; slimfront store {place} --sweep removes what killed writers left over a day ago"
        said = (
            f"; {_size(swept)} of unfinished writes and old checkpoints removed"
            if sweep
            else hint
            if limit is None
            else ""
        )
        _out().print(f"{_size(left)} in all{said}", soft_wrap=True, markup=False)
    if limit is not None and not dry_run and left > limit:
        _err().print(f"{_size(left)} are left: the rest has to stay", soft_wrap=True)
        raise typer.Exit(1)


@tracking_app.command()
def sync(
    folder: Folder,
    uri: Annotated[str | None, typer.Option(help="MLflow's address; without it, that of the study.")] = None,
) -> None:
    """Bring MLflow up to date with a study, after an outage or to another server."""
    from orchestrator.tracking import sync as drain

    outbox = folder / "outbox.db"
    if not outbox.is_file():
        _fail(f"{folder} has no outbox.db: the study was not tracked")
    try:
        drain(outbox, uri or _tracked_at(folder))
    except OSError as error:
        _fail(str(error))


def _overrides(folder: Path) -> list[str]:
    """What the study in this folder was last started with."""
    from orchestrator.ledger import Ledger

    ledger = Ledger(folder / "ledger.db", read_only=True)
    found: list[str] = json.loads(ledger.noted("overrides") or "[]")
    ledger.close()
    return found


def _tracked_at(folder: Path) -> str:
    from orchestrator.config import load

    given = load(folder / "study.yaml", _overrides(folder)).config.tracking.uri
    return given or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


def _tell_what_is_up(place: Place) -> None:
    out = _out()
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
        _fail(str(error))
    except ValueError as error:
        _refuse([str(error)])
    wrong = [line.text for line in lines if line.certain]
    _say_wrong(wrong)
    for line in lines:
        if not line.certain:
            _err().print(
                f"{line.text} (warning)", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    if wrong:
        raise typer.Exit(2)
    _out().print(f"{file} is valid, as far as can be told without asking the cloud", soft_wrap=True)


def _run(prepared: Prepared, overrides: tuple[str, ...]) -> None:
    from cluster.executor import Unavailable
    from cluster.store import is_remote
    from jobs.run import disk_is_full
    from orchestrator.launch import OtherStudy, launch
    from orchestrator.progress import Display

    try:
        with Display(_err()) as display:
            results = launch(prepared, display.show, overrides)
    except KeyboardInterrupt:
        _err().print(f"Interrupted. What ended is kept; go on with: {_resuming(prepared)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except BlockingIOError:
        _fail(f"another process runs the study in {prepared.folder}; see slimfront status {prepared.folder}")
    except OtherStudy as error:
        _fail(str(error))
    except Unavailable as error:
        _fail(f"{error}. What ended is kept; go on with: {_resuming(prepared)}")
    except (OSError, sqlite3.Error) as error:
        if not disk_is_full(error):
            raise
        freed = f" (slimfront store {prepared.folder.parent} --trim 5GB removes what can be made again)"
        _fail(
            f"The disk with {prepared.folder} is full. What ended is kept. Make room"
            f"{'' if is_remote(prepared.config.store) else freed}, then go on with: {_resuming(prepared)}"
        )
    if results.original.failure is not None:
        _err().print(f"The original could not be measured: {results.original.failure.message}", style="red")
        raise typer.Exit(1)
    if results.original.measurement is None:
        _tell_what_ails(prepared.folder, results)
        _err().print("Nothing was measured, the original neither.", style="red")
        raise typer.Exit(1)
    front(str(prepared.folder))
    _publish(prepared, results)
    _tell_what_ails(prepared.folder, results)
    _err().print(f"Report: {prepared.folder / 'report.html'}")
    if not results.members:
        raise typer.Exit(1)


def _resuming(prepared: Prepared) -> str:
    """The command that goes on with a study: by its name where it is a cluster's job, whose folder is the cluster's."""
    from cluster.submit import in_job

    if in_job():
        return f"slimfront resume {prepared.config.name} --address URL"
    return f"slimfront resume {prepared.folder}"


@contextmanager
def _cluster(address: str, insecure: bool) -> Iterator[Jobs]:
    """The jobs of a cluster; what fails there is one line."""
    from cluster.submit import Jobs

    try:
        yield Jobs(address, insecure)
    except (LookupError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, typer.Exit):
            raise
        _fail(_said(error))


def _job(jobs: Jobs, name: str) -> JobState:
    from orchestrator.submission import latest

    return latest(name, jobs.all())


def _tell_what_was_done(done: Attach | Start) -> str:
    """Tell whether a study was started on a cluster; returns its job's id."""
    from orchestrator.submission import Start

    if isinstance(done, Start):
        id, after = done.id, f", to go on where {done.again.id} ended" if done.again else ""
        said = f"{id} was submitted{after}"
    else:
        id, said = done.job.id, f"{done.job.id} is {done.job.status.lower()} already"
    _err().print(said, soft_wrap=True, markup=False, highlight=False)
    return id


def _follow(jobs: Jobs, id: str) -> None:
    """Show a job's log until it ends; exit code 1 where it did not succeed."""
    try:
        state = jobs.follow(id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        said = f"{id} goes on; slimfront logs {id} -f follows it again, slimfront stop {id} ends it"
        _err().print(said, soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
    _err().print(f"{id}: {state.status.lower()}", soft_wrap=True, markup=False)
    if state.status != "SUCCEEDED":
        _err().print(state.message.splitlines()[0] if state.message else "", soft_wrap=True, markup=False)
        raise typer.Exit(1)


def _job_status(name: str, address: str, insecure: bool, as_json: bool) -> None:
    with _cluster(address, insecure) as jobs:
        job = _job(jobs, name)
        written = jobs.log(job.id).rstrip().splitlines()
    if as_json:
        _print_json({**dataclasses.asdict(job), "last_line": written[-1] if written else ""})
        return
    message = job.message.splitlines()[0] if job.message else ""
    _out().print(f"{name}: {job.status.lower()} as {job.id}. {message}", soft_wrap=True, markup=False)
    if written:
        _out().print(written[-1], soft_wrap=True, markup=False, highlight=False)


def _place(name: str, address: str, insecure: bool) -> str:
    from orchestrator.submission import place

    with _cluster(address, insecure) as jobs:
        return place(_job(jobs, name))


def _report(place: str) -> Path:
    """The report of a study's folder, or that of one in a bucket, written here."""
    from cluster.store import is_remote
    from orchestrator.places import published_report
    from orchestrator.progress import write_whole

    if is_remote(place):
        page = Path(f"{place.partition('?')[0].rpartition('/')[2]}.html")
        try:
            write_whole(page, published_report(place))
        except (LookupError, OSError, ValueError) as error:
            _fail(_said(error))
        return page
    page = Path(place) / "report.html"
    if not page.is_file():
        _fail(f"{page} is not there: it is written when a search ends")
    return page


def _front(place: str) -> dict[str, Any]:
    from cluster.store import is_remote
    from orchestrator.places import published

    if not is_remote(place):
        return _read_json(Path(place) / "front.json")
    try:
        return published(place)
    except (LookupError, OSError, ValueError) as error:
        _fail(_said(error))


def _publish(prepared: Prepared, results: Results) -> None:
    from orchestrator.places import publish
    from orchestrator.results import front_json

    try:
        page = (prepared.folder / "report.html").read_text(encoding="utf-8")
        publish(prepared.config.store, prepared.config.name, front_json(results), page)
    except OSError as error:
        said = f"The front is here, and not in the store: {error}. slimfront resume {prepared.folder} puts it there"
        _err().print(said, soft_wrap=True, markup=False)


def _tell_what_ails(folder: Path, results: Results) -> None:
    from orchestrator.results import reasons, told_apart_by_chance

    exhausted = _read_json(folder / "status.json").get("exhausted")
    if exhausted is not None:
        _err().print(f"The search ended early: {exhausted}.", soft_wrap=True)
    failed = reasons(results)
    for count, reason in failed[:5]:
        _err().print(f"{count} failed, {reason}", soft_wrap=True, markup=False)
    if len(failed) > 5:
        _err().print(
            f"{sum(count for count, _ in failed[5:])} failed of other reasons; the report has all of them"
        )
    for metric in told_apart_by_chance(results):
        _err().print(
            f"No two models of the front differ in {metric} by more than chance may do: more evaluation data "
            "(data.evaluation) would tell them apart.",
            soft_wrap=True,
        )


def _show_store(held: Inventory, gone: list[Item], went: str | None) -> None:
    from orchestrator import trim as trimming

    found = trimming.summary(held, gone)
    columns = {"size": "size_bytes", "may go": "removable_bytes"} | ({went: "removed_bytes"} if went else {})
    table = Table("what", "number", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, of_kind in found["kinds"].items():
        sizes = (of_kind[key] for key in columns.values())
        table.add_row(trimming.CALLED[kind], str(of_kind["number"]), *map(_size, sizes))
    out = _out()
    out.print(table)
    for study in found["studies"]:
        state = ", running" if study["running"] else ""
        out.print(f"{study['study']}{state}: {study['front']} on its front")


def _show_technique(entry: Entry) -> None:
    out = _out()
    out.print(f"[bold]{entry.name}[/] ({entry.kind}, version {entry.version}): {escape(entry.about)}")
    out.print(f"Paper: {escape(entry.paper)}")
    leaves = f", leaves {' and '.join(entry.leaves)} ones" if entry.leaves else ""
    out.print(f"Works on {' and '.join(entry.works_on)} linears{leaves}.")
    out.print(f"Needs {', '.join(entry.needs) or 'no data'}.")
    out.print(f"Families: {', '.join(entry.families)}.")
    for reason, refused in entry.refusals().items():
        out.print(f"Refuses {', '.join(refused)}: {escape(reason)}.")
    table = Table("option", "default", "may be", "what it does")
    for option in entry.options:
        table.add_row(option.name, option.default, escape(option.domain), escape(option.help))
    out.print(table)


def _prepared(study: Path, overrides: list[str] | None) -> Prepared:
    from orchestrator.config import InvalidStudy, load
    from orchestrator.prepare import prepare

    try:
        return prepare(load(study, overrides or []))
    except InvalidStudy as error:
        _refuse(error.lines)


def _refuse(problems: Sequence[str]) -> NoReturn:
    _say_wrong(problems)
    raise typer.Exit(2)


def _cells(row: dict[str, Any], metrics: list[str], original: dict[str, Any] | None) -> list[str]:
    return [_cell(metric, row, original) for metric in metrics]


def _cell(metric: str, row: dict[str, Any], original: dict[str, Any] | None) -> str:
    value, error = row["metrics"].get(metric), row["errors"].get(metric, 0.0)
    apart = row.get("differences", {}).get(metric)
    if value is None:
        return "–"
    if apart is not None:
        return f"{value:.4g} ({apart['value']:+.2g} ± {apart['error']:.1g})"
    if metric == "size_bytes":
        shown = f"{value / 1e6:.1f} MB"
    else:
        shown = f"{value:.4g}" + (f" ± {error:.2g}" if error else "")
    base = None if original is None else original["metrics"].get(metric)
    return shown if not base or metric != "size_bytes" else f"{shown} ({value / base:.0%})"


def _size(size_bytes: int) -> str:
    return filesize.decimal(size_bytes)


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        _fail(f"{file} is not there: {file.parent} holds no study, or nothing of it has ended yet")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))


def _said(error: BaseException) -> str:
    # A LookupError of several kinds puts its message into quotes.
    return str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)


def _say_wrong(lines: Sequence[str]) -> None:
    for line in lines:
        _err().print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _say_wrong([message])
    raise typer.Exit(3)


def _out() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)


def _err() -> Console:
    return Console(stderr=True)
