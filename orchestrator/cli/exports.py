"""Commands about exported models: export, verify, compare, chat."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from orchestrator.cli.console import AsJson, Folder, error_message, fail, stderr_console, stdout_console
from orchestrator.cli.tables import print_json


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
    from orchestrator.publishing.export import export_member

    try:
        member = export_member(folder, pick, out, format)
    except (ImportError, LookupError, OSError, ValueError) as error:
        fail(error_message(error))
    stdout_console().print(f"{member['id']} → {out}\n{member['recipe']}")


Exported = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `slimfront export` wrote.")]


def verify(folder: Exported, as_json: AsJson = False) -> None:
    """Measure an export again, beside what was recorded; exit code 1 where they differ by more than the errors."""
    from orchestrator.publishing.verify import verify as measured_again

    try:
        found = measured_again(folder)
    except (ImportError, LookupError, OSError, ValueError) as error:
        fail(error_message(error))
    if as_json:
        print_json([{**dataclasses.asdict(one), "ok": one.ok} for one in found])
    else:
        table = Table(
            "metric", "recorded", "measured", "may differ by", "", title=str(folder), title_justify="left"
        )
        for one in found:
            allowed = "–" if one.allowed is None else f"{one.allowed:.3g}"
            state = one.note or ("✓" if one.ok else "[red]✗ differs by more[/]")
            table.add_row(one.metric, f"{one.recorded:.6g}", f"{one.measured:.6g}", allowed, state)
        stdout_console().print(table)
    if not all(one.ok for one in found):
        raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="What `slimfront export` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another export, of any form.")],
    pairs: Annotated[
        int, typer.Option(min=1, help="How often each is timed, in turns: 6 make 95 % sure.")
    ] = 6,
    as_json: AsJson = False,
) -> None:
    """Compare two exports: quality on the same items, times in turns, so that drift and hard texts drop out."""
    from orchestrator.publishing.compare import compare as compared

    try:
        found = compared(first, second, pairs)
    except (ImportError, LookupError, OSError, ValueError) as error:
        fail(error_message(error))
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
        return
    table = Table("metric", str(first), str(second), "second against first", "")
    for one in found:
        time = one.metric.endswith("_ms")
        against = f"× {one.against:.3f}" if time else f"{one.against:+.4g}"
        bounds = "" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}, {one.confidence:.0%} sure"
        table.add_row(one.metric, f"{one.first:.6g}", f"{one.second:.6g}", against, bounds)
    stdout_console().print(table)


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
    from orchestrator.publishing.chat import Chat

    try:
        talking = Chat(folder, threads)
    except (ImportError, LookupError, OSError, ValueError) as error:
        fail(error_message(error))
    if prompt is None:
        stderr_console().print(f"{folder} in {talking.runtime}; an empty line ends it")
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
