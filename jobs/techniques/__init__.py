"""Techniques, one per file: the file's name is the technique's name in code, YAML, MLflow and docs."""

from __future__ import annotations

import functools
import pkgutil

from jobs.plugins import module_of
from jobs.technique import Technique


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all techniques, the files of this folder, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> type[Technique]:
    """Return the Technique class of `jobs/techniques/NAME.py`.

    Raises LookupError for an unknown name, with the nearest known one. Errors of the module's own imports are
    not caught.
    """
    module = module_of("technique", name, names(), f"{__name__}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise LookupError(f"{module.__name__} must define exactly one Technique, it defines {len(classes)}")
    return classes[0]
