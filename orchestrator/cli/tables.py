"""Tables and numbers for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from rich import filesize
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.console import ExitCode, stderr_console, stdout_console

if TYPE_CHECKING:
    from cluster.doctor import Fact
    from orchestrator.cli.technique_catalogue import Entry
    from orchestrator.publishing.store_usage import Inventory, Item
    from orchestrator.study.front_snapshot import Difference, FrontSnapshot, MeasuredModel
    from orchestrator.study.results import Results

SHOWN_FAILURES = 5
"""Kinds of failures on the terminal; the report shows all."""


def show_findings(facts: Sequence[Fact]) -> None:
    """Print checks. A failed check ends the command with NO_RESULT."""
    table = Table("check", "result", "hint")
    for fact in facts:
        mark = "" if fact.ok else "[red]✗[/] "
        table.add_row(fact.what, mark + escape(fact.value), escape(fact.hint))
    stdout_console().print(table)
    if not all(fact.ok for fact in facts):
        raise typer.Exit(ExitCode.NO_RESULT)


def print_failures(results: Results, exhausted: str | None) -> None:
    """Print the reasons of failed candidates, and of a search that ended early.

    exhausted: the reason why the search ended early.
    """
    from orchestrator.study.results import indistinguishable_objectives, reasons

    err = stderr_console()
    if exhausted is not None:
        err.print(f"The search ended early: {exhausted}.", soft_wrap=True)
    failures = reasons(results)
    for count, reason in failures[:SHOWN_FAILURES]:
        err.print(f"{count} failed, {reason}", soft_wrap=True, markup=False)
    further = sum(count for count, _ in failures[SHOWN_FAILURES:])
    if further:
        err.print(f"{further} failed for other reasons; the report shows all of them")
    for metric in indistinguishable_objectives(results):
        err.print(
            f"The differences in {metric} between models on the front are within two standard errors. "
            "More evaluation data (data.evaluation) makes the errors smaller.",
            soft_wrap=True,
        )


def show_front(front: FrontSnapshot) -> None:
    metrics = [objective.metric for objective in front.objectives]
    table = Table("id", *metrics, "recipe", title=f"Pareto front of {front.study}", title_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    original = _original_cells(front.original, metrics)
    table.add_row("original", *original, "", style="bold", end_section=True)
    paired = False
    for member in front.members:
        cells = [
            _member_cell(metric, member.measured, member.differences, front.original) for metric in metrics
        ]
        paired = paired or not member.differences.keys().isdisjoint(metrics)
        table.add_row(member.id[:8], *cells, member.recipe)
    if paired:
        table.caption = "In parentheses: the paired difference from the original ± its standard error."
    stdout_console().print(table)


def _original_cells(original: MeasuredModel, metrics: Sequence[str]) -> list[str]:
    return [_value(metric, original) for metric in metrics]


def _member_cell(
    metric: str, measured: MeasuredModel, differences: Mapping[str, Difference], original: MeasuredModel
) -> str:
    if metric not in measured.metrics:
        return _value(metric, measured)
    value, original_value = measured.metrics[metric], original.metrics.get(metric)
    if metric in differences:
        difference = differences[metric]
        return f"{value:.4g} ({difference.value:+.2g} ± {difference.error:.1g})"
    if metric == "size_bytes" and original_value:
        return f"{_value(metric, measured)} ({value / original_value:.0%})"
    return _value(metric, measured)


def _value(metric: str, measured: MeasuredModel) -> str:
    if metric not in measured.metrics:
        return "–"
    value, error = measured.metrics[metric], measured.errors.get(metric, 0.0)
    if metric == "size_bytes":
        return megabytes(value)
    if error:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.4g}"


def show_store(usage: Inventory, evicted: list[Item], evicted_column: str | None) -> None:
    """Print the items of a store by kind.

    evicted_column: the heading of the column with the sizes of `evicted`; None hides it.
    """
    from orchestrator.publishing import store_usage

    summary = store_usage.summary(usage, evicted)
    columns = {"size": "size_bytes", "evictable": "removable_bytes"}
    if evicted_column is not None:
        columns[evicted_column] = "removed_bytes"
    table = Table("kind", "number", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, totals in summary["kinds"].items():
        sizes = [size_text(totals[key]) for key in columns.values()]
        table.add_row(store_usage.LABELS[kind], str(totals["number"]), *sizes)
    out = stdout_console()
    out.print(table)
    for study in summary["studies"]:
        state = " (running)" if study["running"] else ""
        out.print(f"{study['study']}{state}: {study['front']} models on the front")


def show_techniques(entries: Sequence[Entry]) -> None:
    table = Table("name", "kind", "works on", "produces", "needs", "refuses")
    for entry in entries:
        refused = [model for models in entry.refusals().values() for model in models]
        lists = (entry.works_on, entry.produces, entry.needs, refused)
        table.add_row(entry.name, entry.kind, *(", ".join(names) for names in lists))
    out = stdout_console()
    out.print(table)
    out.print("slimfront techniques NAME shows the options, the paper and the reasons of one technique.")


def show_technique(entry: Entry) -> None:
    out = stdout_console()
    out.print(f"[bold]{entry.name}[/] ({entry.kind}, version {entry.version}): {escape(entry.about)}")
    out.print(f"Paper: {escape(entry.paper)}")
    produces = f", produces {' and '.join(entry.produces)} linears" if entry.produces else ""
    out.print(f"Works on {' and '.join(entry.works_on)} linears{produces}.")
    out.print(f"Needs {', '.join(entry.needs) or 'no data'}.")
    out.print(f"Families: {', '.join(entry.families)}.")
    for reason, refused in entry.refusals().items():
        out.print(f"Refuses {', '.join(refused)}: {escape(reason)}.")
    table = Table("option", "default", "allowed values", "effect")
    for option in entry.options:
        table.add_row(option.name, option.default, escape(option.domain), escape(option.help))
    out.print(table)


def size_text(size_bytes: int) -> str:
    return filesize.decimal(size_bytes)


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))
