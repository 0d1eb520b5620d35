"""`python -m orchestrator` is `slimfront`."""

from orchestrator.cli import main

main()
