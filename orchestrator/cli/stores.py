"""Commands about stores, tracking and techniques."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.console import (
    USER_ERRORS,
    AsJson,
    ExitCode,
    Folder,
    exit_on_error,
    fail,
    recorded_overrides,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.tables import print_json, show_store, show_technique, show_techniques, size_text


def techniques(
    name: Annotated[str | None, typer.Argument(help="Show this technique in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the techniques, or show one with its options, its paper and the models that it refuses."""
    from jobs import techniques as plugins
    from orchestrator.cli import technique_catalogue

    names = plugins.names() if name is None else [name]
    with exit_on_error(LookupError):
        entries = technique_catalogue.entries(names)
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
    elif name is None:
        show_techniques(entries)
    else:
        show_technique(entries[0])


def store(
    address: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="The `store` of a study file, such as runs or s3://bucket/prefix."
        ),
    ],
    trim: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Evict items until at most this size remains, such as 5GB."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Remove incomplete writes and checkpoints that were not used for a day."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the items to remove.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the disk usage of a store, and evict items that can be made again; fronts and results are kept."""
    from cluster.storage.open import is_remote
    from orchestrator.publishing import store_usage

    remote = is_remote(address)
    if trim is not None and remote:
        fail("--trim is for local stores: studies on other machines may need items of a bucket; use --sweep")
    with exit_on_error(*USER_ERRORS):
        limit = None if trim is None else store_usage.parse_size(trim)
        swept = store_usage.sweep(address) if sweep and not dry_run else 0
        usage = store_usage.inventory_at(address)
        evicted = [] if limit is None else usage.to_evict(limit)
        if not dry_run:
            evicted = store_usage.remove(evicted)
    remaining = usage.size_bytes
    if evicted and not dry_run:
        remaining = store_usage.inventory_at(address).size_bytes
    if as_json:
        totals = {"size_bytes": remaining, "swept_bytes": swept, "dry_run": dry_run}
        print_json({**store_usage.summary(usage, evicted), **totals})
    else:
        evicted_column = None
        if limit is not None:
            evicted_column = "to evict" if dry_run else "evicted"
        show_store(usage, evicted, evicted_column)
        total = f"{size_text(remaining)} in all"
        if sweep:
            total += f"; {size_text(swept)} of incomplete writes and old checkpoints removed"
        elif limit is None:
            total += f"; {_hint(address, remote)}"
        stdout_console().print(total, soft_wrap=True, markup=False)
    if limit is not None and not dry_run and remaining > limit:
        stderr_console().print(
            f"{size_text(remaining)} remain: the other items are not evictable", soft_wrap=True
        )
        raise typer.Exit(ExitCode.NO_RESULT)


def _hint(address: str, remote: bool) -> str:
    if remote:
        return (
            f"slimfront store {address} --sweep removes incomplete writes and checkpoints not used for a day"
        )
    return (
        f"slimfront store {address} --trim 5GB evicts all but 5 GB; evicted items are made again when needed"
    )


def sync(
    folder: Folder,
    uri: Annotated[
        str | None, typer.Option(help="Address of MLflow; by default the one of the study.")
    ] = None,
) -> None:
    """Deliver the events of a study to MLflow, after an outage or to another server."""
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.tracking import sync as deliver

    outbox = StudyFolder(folder).outbox
    if not outbox.is_file():
        fail(f"{folder} has no {outbox.name}: the study was not tracked")
    with exit_on_error(OSError):
        deliver(outbox, uri or _tracking_uri(folder))


def _tracking_uri(folder: Path) -> str:
    from orchestrator.config.load import load
    from orchestrator.persistence.study_folder import StudyFolder

    files = StudyFolder(folder)
    uri = load(files.study_file, recorded_overrides(folder)).config.tracking.uri
    return uri or f"sqlite:///{files.tracking_database}"
