"""One file, one technique: the file's name is the technique's name, in code, YAML, MLflow and docs."""

from __future__ import annotations

import functools
import pkgutil

from jobs.plugins import module_of
from jobs.technique import Technique


@functools.cache
def names() -> tuple[str, ...]:
    """Every technique there is, in alphabetical order, read from the files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> type[Technique]:
    """The one Technique class of `jobs/techniques/NAME.py`.

    Raises LookupError for an unknown name (with the nearest known one), and whatever the module's
    own import raises.
    """
    module = module_of("technique", name, names(), f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise LookupError(f"{module.__name__} must define exactly one Technique, it defines {len(found)}")
    return found[0]
