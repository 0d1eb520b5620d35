"""`python -m orchestrator` is `slimfront`."""

from orchestrator.cli.app import main

main()
