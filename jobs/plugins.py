"""Lookup: the module that stands for a name, where one file adds one thing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from types import ModuleType


def module_of(what: str, name: str, known: Sequence[str], path: str) -> ModuleType:
    """The module at `path`, which stands for `name`. LookupError, with the nearest of the `known` names, where it is
    none of them; `what` says what they are names of. What the module's own import raises is not caught: a thing
    with a missing dependency is an error, never absent in silence."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise LookupError(f"no {what} is called {name!r}{hint} (there are: {', '.join(known)})")
    return importlib.import_module(path)
