"""Run a study: launch it, loop over its events, report its progress and its cost."""
