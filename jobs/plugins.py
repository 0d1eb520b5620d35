"""Find the module of a plugin by its name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from types import ModuleType


def module_of(kind: str, name: str, names: Sequence[str], path: str) -> ModuleType:
    """Import the module at `path`, the plugin `name` of a kind such as "technique".

    Raises LookupError with the nearest name if `name` is not in `names`. Errors of the import itself are not caught: a
    plugin whose dependency is missing is an error, and never absent in silence.
    """
    if name not in names:
        hint = ""
        if nearest := difflib.get_close_matches(name, names, n=1):
            hint = f"; did you mean {nearest[0]}?"
        raise LookupError(f"no {kind} is called {name!r}{hint} (there are: {', '.join(names)})")
    return importlib.import_module(path)
