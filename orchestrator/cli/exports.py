"""Commands about exported models: export, verify, compare, chat."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orchestrator.cli.console import (
    USER_ERRORS,
    AsJson,
    ExitCode,
    Folder,
    exit_on_error,
    stderr_console,
    stdout_console,
)
from orchestrator.cli.tables import print_json

if TYPE_CHECKING:
    from orchestrator.publishing.compare import ComparedMetric
    from orchestrator.publishing.verify import VerifiedMetric


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, new or empty.")],
    pick: Annotated[
        str, typer.Option(help="knee, smallest, fastest, most-accurate, or the start of a member's id.")
    ] = "knee",
    format: Annotated[
        str | None, typer.Option(help="The file format; by default the one that the study's target runs.")
    ] = None,
) -> None:
    """Write a model of the front with a model card, its recipe, its measurement and checksums."""
    from orchestrator.publishing.export import export_member

    with exit_on_error(*USER_ERRORS):
        member = export_member(folder, pick, out, format)
    stdout_console().print(f"{member.id} → {out}\n{member.recipe}")


Exported = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `slimfront export` wrote.")]


def verify(folder: Exported, as_json: AsJson = False) -> None:
    """Measure an export again; exit code 1 if a metric differs from its recorded value by more than the errors."""
    from orchestrator.publishing.verify import verify as measure_again

    with exit_on_error(*USER_ERRORS):
        rows = measure_again(folder)
    if as_json:
        print_json([{**dataclasses.asdict(row), "ok": row.ok} for row in rows])
    else:
        stdout_console().print(_verified_table(folder, rows))
    if not all(row.ok for row in rows):
        raise typer.Exit(ExitCode.NO_RESULT)


def _verified_table(folder: Path, rows: list[VerifiedMetric]) -> Table:
    table = Table(
        "metric", "recorded", "measured", "tolerance", "result", title=str(folder), title_justify="left"
    )
    for row in rows:
        tolerance = "–" if row.allowed is None else f"{row.allowed:.3g}"
        result = row.note
        if not result:
            result = "✓" if row.ok else "[red]✗ differs by more[/]"
        table.add_row(row.metric, f"{row.recorded:.6g}", f"{row.measured:.6g}", tolerance, result)
    return table


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A folder that `slimfront export` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another export, in any format.")],
    pairs: Annotated[
        int, typer.Option(min=1, help="Number of timings of each, in alternation; 6 give 95 % confidence.")
    ] = 6,
    as_json: AsJson = False,
) -> None:
    """Compare two exports: quality on the same evaluation items, times measured in alternation."""
    from orchestrator.publishing.compare import compare as compare_exports

    with exit_on_error(*USER_ERRORS):
        rows = compare_exports(first, second, pairs)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        stdout_console().print(_compared_table(first, second, rows))


def _compared_table(first: Path, second: Path, rows: list[ComparedMetric]) -> Table:
    table = Table("metric", str(first), str(second), "second relative to first", "interval")
    for row in rows:
        against = f"× {row.against:.3f}" if row.metric.endswith("_ms") else f"{row.against:+.4g}"
        interval = ""
        if row.low != row.high:
            interval = f"{row.low:.4g} to {row.high:.4g} ({row.confidence:.0%})"
        table.add_row(row.metric, f"{row.first:.6g}", f"{row.second:.6g}", against, interval)
    return table


def chat(
    folder: Exported,
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this prompt and end; without it, read prompts from the terminal."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Generate text with an export in its runtime."""
    from orchestrator.publishing.chat import Chat

    with exit_on_error(*USER_ERRORS):
        model = Chat(folder, threads)

    def answer(message: str) -> None:
        for text in model.reply(message, tokens, temperature, seed):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")

    if prompt is not None:
        if prompt.strip():
            answer(prompt)
        return
    stderr_console().print(f"{folder} in {model.runtime}; an empty line ends the chat")
    while True:
        message = str(typer.prompt(">", default="", show_default=False, prompt_suffix=" "))
        if not message.strip():
            return
        answer(message)
