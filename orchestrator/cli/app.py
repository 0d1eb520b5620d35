"""The command `slimfront`: thin; every decision lies elsewhere.

Exit codes: 0 done; 1 it ran and the result is not what was hoped for (nothing measured, original failed);
2 the input is wrong, nothing was started; 3 something is not as it must be (folder of another study,
already running, missing); 130 interrupted, `slimfront resume` goes on.
"""

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
tracking_app = typer.Typer(help="The mirror of studies in MLflow.", no_args_is_help=True)
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
    """The entry point of the `slimfront` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
