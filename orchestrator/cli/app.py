"""The command `slimfront`: thin; every decision lies elsewhere.

Exit codes: 0 done; 1 it ran and the result is not what was hoped for (nothing measured, original failed);
2 the input is wrong, nothing was started; 3 something is not as it must be (folder of another study,
already running, missing); 130 interrupted, `slimfront resume` goes on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Find the Pareto front of smaller language models, measured on the files you would ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tracking_app = typer.Typer(help="The mirror of studies in MLflow.", no_args_is_help=True)
app.add_typer(tracking_app, name="tracking")


def main() -> None:
    """The entry point of the `slimfront` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
