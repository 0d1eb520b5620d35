"""Tables and numbers as the terminal shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import filesize
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.console import read_json, stderr_console, stdout_console

if TYPE_CHECKING:
    from cluster.doctor import Fact
    from orchestrator.cli.doctor_checks import Finding
    from orchestrator.cli.technique_catalogue import Entry
    from orchestrator.publishing.store_usage import Inventory, Item
    from orchestrator.study.results import Results


def show_findings(findings: Sequence[Finding | Fact]) -> None:
    table = Table("what", "found", "what to do")
    for finding in findings:
        mark = "" if finding.ok else "[red]✗[/] "
        table.add_row(finding.what, mark + escape(finding.value), escape(finding.hint))
    stdout_console().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def print_failures(folder: Path, results: Results) -> None:
    from orchestrator.persistence.study_folder import StudyFolder
    from orchestrator.study.results import indistinguishable_objectives, reasons

    exhausted = read_json(StudyFolder(folder).status).get("exhausted")
    if exhausted is not None:
        stderr_console().print(f"The search ended early: {exhausted}.", soft_wrap=True)
    failed = reasons(results)
    for count, reason in failed[:5]:
        stderr_console().print(f"{count} failed, {reason}", soft_wrap=True, markup=False)
    if len(failed) > 5:
        stderr_console().print(
            f"{sum(count for count, _ in failed[5:])} failed of other reasons; the report has all of them"
        )
    for metric in indistinguishable_objectives(results):
        stderr_console().print(
            f"No two models of the front differ in {metric} by more than chance may do: more evaluation data "
            "(data.evaluation) would tell them apart.",
            soft_wrap=True,
        )


def show_store(held: Inventory, gone: list[Item], went: str | None) -> None:
    from orchestrator.publishing import store_usage as trimming

    found = trimming.summary(held, gone)
    columns = {"size": "size_bytes", "may go": "removable_bytes"} | ({went: "removed_bytes"} if went else {})
    table = Table("what", "number", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, of_kind in found["kinds"].items():
        sizes = (of_kind[key] for key in columns.values())
        table.add_row(trimming.CALLED[kind], str(of_kind["number"]), *map(size_text, sizes))
    out = stdout_console()
    out.print(table)
    for study in found["studies"]:
        state = ", running" if study["running"] else ""
        out.print(f"{study['study']}{state}: {study['front']} on its front")


def show_technique(entry: Entry) -> None:
    out = stdout_console()
    out.print(f"[bold]{entry.name}[/] ({entry.kind}, version {entry.version}): {escape(entry.about)}")
    out.print(f"Paper: {escape(entry.paper)}")
    leaves = f", leaves {' and '.join(entry.produces)} ones" if entry.produces else ""
    out.print(f"Works on {' and '.join(entry.works_on)} linears{leaves}.")
    out.print(f"Needs {', '.join(entry.needs) or 'no data'}.")
    out.print(f"Families: {', '.join(entry.families)}.")
    for reason, refused in entry.refusals().items():
        out.print(f"Refuses {', '.join(refused)}: {escape(reason)}.")
    table = Table("option", "default", "may be", "what it does")
    for option in entry.options:
        table.add_row(option.name, option.default, escape(option.domain), escape(option.help))
    out.print(table)


def front_cells(row: dict[str, Any], metrics: list[str], original: dict[str, Any] | None) -> list[str]:
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


def size_text(size_bytes: int) -> str:
    return filesize.decimal(size_bytes)


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))
