"""What the commands share: options, output, errors and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from orchestrator.planning.prepared_study import PreparedStudy

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

CLUSTER_HELP = "A cluster's dashboard, such as http://head:8265"

Cluster = Annotated[
    str, typer.Option("--address", envvar="RAY_ADDRESS", metavar="URL", help=f"{CLUSTER_HELP}.")
]

OnCluster = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help=f"{CLUSTER_HELP}: NAME is asked for there, and no folder here."
    ),
]

Insecure = Annotated[
    bool, typer.Option("--insecure", help="Also talk to a cluster that lets anybody in, without a token.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def recorded_overrides(folder: Path) -> list[str]:
    """What the study in this folder was last started with."""
    from orchestrator.persistence.ledger import Ledger
    from orchestrator.persistence.study_folder import StudyFolder

    ledger = Ledger(StudyFolder(folder).ledger, read_only=True)
    found: list[str] = json.loads(ledger.noted("overrides") or "[]")
    ledger.close()
    return found


def prepared_study(study: Path, overrides: list[str] | None) -> PreparedStudy:
    from orchestrator.config.load import load
    from orchestrator.config.problems import InvalidStudyError
    from orchestrator.planning.prepare import prepare

    try:
        return prepare(load(study, overrides or []))
    except InvalidStudyError as error:
        refuse(error.lines)


def refuse(problems: Sequence[str]) -> NoReturn:
    print_problems(problems)
    raise typer.Exit(2)


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        fail(f"{file} is not there: {file.parent} holds no study, or nothing of it has ended yet")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def error_message(error: BaseException) -> str:
    # A LookupError of several kinds puts its message into quotes.
    return str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)


def print_problems(lines: Sequence[str]) -> None:
    for line in lines:
        stderr_console().print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    print_problems([message])
    raise typer.Exit(3)


def stdout_console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)


def stderr_console() -> Console:
    return Console(stderr=True)
