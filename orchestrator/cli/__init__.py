"""The `slimfront` command."""
