"""The options, output streams, error messages and exit codes that all commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from orchestrator.config.problems import InvalidStudyError

if TYPE_CHECKING:
    from orchestrator.planning.prepared_study import PreparedStudy

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of the study file."),
]

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A study's folder, such as runs/quickstart.")]

FolderOrUrl = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER", help="A study's folder, such as runs/quickstart, or s3://bucket/prefix/NAME."
    ),
]

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name, or the id of its job.")]

CLUSTER_HELP = "The URL of a Ray cluster's dashboard, such as http://head:8265"

Cluster = Annotated[
    str, typer.Option("--address", envvar="RAY_ADDRESS", metavar="URL", help=f"{CLUSTER_HELP}.")
]

OnCluster = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help=f"{CLUSTER_HELP}; give the study's NAME instead of a folder."
    ),
]

Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Also use a cluster that accepts unauthenticated requests."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class ExitCode(IntEnum):
    """The exit codes of `slimfront`, besides 0."""

    NO_RESULT = 1
    """The command ran, and its result is negative: the front is empty, the original failed, a check failed."""
    INVALID_INPUT = 2
    """The input is invalid, and nothing was started."""
    FAILED = 3
    """The command could not be carried out: a folder holds no study or another one, the study runs already, …"""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM."""


def error_message(error: BaseException) -> str:
    # str() of a KeyError, which is a LookupError, puts quotes around the message.
    if isinstance(error, LookupError) and error.args:
        return str(error.args[0])
    return str(error)


USER_ERRORS = (ImportError, LookupError, OSError, ValueError)
"""The errors that a missing file or library, a wrong name or a wrong value raises."""


@contextmanager
def exit_on_error(
    *errors: type[Exception],
    code: ExitCode = ExitCode.FAILED,
    explain: Callable[[Exception], str | None] = error_message,
    interrupted: str | None = None,
) -> Iterator[None]:
    """End the command with a message and an exit code instead of a traceback.

    An invalid study ends it with INVALID_INPUT. One of `errors` ends it with `code` and the message that `explain`
    returns; if that is None, the error is raised. Ctrl-C ends it with INTERRUPTED, if `interrupted`, its message, is
    given. All other errors are raised.
    """
    try:
        yield
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        stderr_console().print(interrupted, soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except typer.Exit:
        raise
    except InvalidStudyError as error:
        refuse(error.lines)
    except errors as error:
        message = explain(error)
        if message is None:
            raise
        print_problems([message])
        raise typer.Exit(code) from None


def refuse(problems: Sequence[str]) -> NoReturn:
    """End the command because of invalid input."""
    print_problems(problems)
    raise typer.Exit(ExitCode.INVALID_INPUT)


def fail(message: str) -> NoReturn:
    """End the command because it cannot be carried out."""
    print_problems([message])
    raise typer.Exit(ExitCode.FAILED)


def print_problems(lines: Sequence[str]) -> None:
    for line in lines:
        stderr_console().print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def recorded_overrides(folder: Path) -> list[str]:
    """Return the overrides with which the study in this folder was last started."""
    from orchestrator.persistence.ledger import Ledger
    from orchestrator.persistence.study_folder import StudyFolder

    ledger = Ledger(StudyFolder(folder).ledger, read_only=True)
    overrides: list[str] = json.loads(ledger.noted("overrides") or "[]")
    ledger.close()
    return overrides


def prepared_study(study: Path, overrides: list[str] | None) -> PreparedStudy:
    """Load and check a study file. An invalid one ends the command."""
    from orchestrator.config.load import load

    with exit_on_error():
        loaded = load(study, overrides or [])
        from orchestrator.planning.prepare import (
            prepare,
        )  # imports torch, which an unreadable file does not need

        return prepare(loaded)


def stdout_console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)


def stderr_console() -> Console:
    return Console(stderr=True)
