"""Commands about stores, tracking and techniques."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from orchestrator.cli.console import (
    AsJson,
    Folder,
    error_message,
    fail,
    recorded_overrides,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.tables import print_json, show_store, show_technique, size_text


def techniques(
    name: Annotated[str | None, typer.Argument(help="One of them, to see all there is to it.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the techniques, or show one: what it is, needs and works on, its options, what it refuses and why."""
    from jobs import techniques as known
    from orchestrator.cli import technique_catalogue

    try:
        entries = technique_catalogue.entries(known.names() if name is None else [name])
    except LookupError as error:
        fail(str(error))
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
    elif name is None:
        table = Table("name", "kind", "works on", "leaves", "needs", "refuses")
        for entry in entries:
            table.add_row(
                entry.name, entry.kind, *map(", ".join, (entry.works_on, entry.produces, entry.needs)),
                ", ".join(model for models in entry.refusals().values() for model in models),
            )  # fmt: skip
        stdout_console().print(table)
        stdout_console().print(
            "slimfront techniques NAME shows one with its options, its paper and why it refuses."
        )
    else:
        show_technique(entries[0])


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
    from cluster.storage.open import is_remote
    from orchestrator.publishing import store_usage as trimming

    if trim is not None and is_remote(place):
        fail("a bucket is not trimmed: studies on other machines may need what it holds; --sweep is safe")
    try:
        limit = None if trim is None else trimming.parse_size(trim)
        swept = trimming.sweep(place) if sweep and not dry_run else 0
        held = trimming.find_studies(place)
        beyond = [] if limit is None else held.beyond(limit)
        gone = beyond if dry_run else trimming.remove(beyond)
    except (LookupError, OSError, ValueError) as error:
        fail(error_message(error))
    left = trimming.find_studies(place).size_bytes if gone and not dry_run else held.size_bytes
    if as_json:
        told = {"size_bytes": left, "swept_bytes": swept, "dry_run": dry_run}
        print_json({**trimming.summary(held, gone), **told})
    else:
        show_store(held, gone, None if limit is None else "would go" if dry_run else "removed")
        hint = f"; what may go is made again when needed: slimfront store {place} --trim 5GB leaves no more than that"
        if is_remote(place):
            hint = f"; slimfront store {place} --sweep removes what killed writers left over a day ago"
        said = (
            f"; {size_text(swept)} of unfinished writes and old checkpoints removed"
            if sweep
            else hint
            if limit is None
            else ""
        )
        stdout_console().print(f"{size_text(left)} in all{said}", soft_wrap=True, markup=False)
    if limit is not None and not dry_run and left > limit:
        stderr_console().print(f"{size_text(left)} are left: the rest has to stay", soft_wrap=True)
        raise typer.Exit(1)


def sync(
    folder: Folder,
    uri: Annotated[str | None, typer.Option(help="MLflow's address; without it, that of the study.")] = None,
) -> None:
    """Bring MLflow up to date with a study, after an outage or to another server."""
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.tracking import sync as drain

    outbox = StudyFolder(folder).outbox
    if not outbox.is_file():
        fail(f"{folder} has no {outbox.name}: the study was not tracked")
    try:
        drain(outbox, uri or _tracked_at(folder))
    except OSError as error:
        fail(str(error))


def _tracked_at(folder: Path) -> str:
    from orchestrator.config.load import load
    from orchestrator.persistence.study_folder import StudyFolder

    files = StudyFolder(folder)
    given = load(files.study_file, recorded_overrides(folder)).config.tracking.uri
    return given or f"sqlite:///{files.tracking_database}"
