"""The `slimfront` command: the list of its subcommands. `orchestrator.cli.console.ExitCode` has the exit codes."""

from __future__ import annotations

import os

import typer

from orchestrator.cli import clusters, exports, stores, studies

app = typer.Typer(
    help="Find the Pareto front of smaller language models, measured on the files you would ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tracking_app = typer.Typer(help="Studies in MLflow.", no_args_is_help=True)
app.add_typer(tracking_app, name="tracking")
tracking_app.command()(stores.sync)

for command in (
    studies.validate,
    studies.plan,
    studies.search,
    clusters.submit,
    clusters.logs,
    clusters.stop,
    studies.resume,
    studies.status,
    studies.front,
    studies.report,
    exports.export,
    exports.verify,
    exports.compare,
    exports.chat,
    stores.techniques,
    clusters.init,
    clusters.up,
    clusters.doctor,
    stores.store,
):
    app.command()(command)


def main() -> None:
    """Run the `slimfront` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
