"""What the machines that clouds lend have, from a table of a stated date."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

import yaml


@dataclass(frozen=True)
class Instance:
    """cpus: as the cloud counts them, two to a core on most types; gpu: the kind, as sellers call it."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    gpu: str | None = None


@dataclass(frozen=True)
class Table:
    """as_of: the day it was put together, as 2026-11-23."""

    as_of: str
    types: Mapping[str, Instance]

    @property
    def most_gpus(self) -> str:
        """The name of the type with the most GPUs."""
        return max(self.types, key=lambda name: self.types[name].gpus)


@functools.cache
def table(cloud: str) -> Table:
    """The types of `aws` or `gcp`."""
    content = yaml.safe_load((files("cluster.templates") / "shipped" / "instances.yaml").read_text("utf-8"))
    types = {name: Instance(**row) for name, row in content[cloud].items()}
    return Table(str(content["as_of"]), MappingProxyType(types))
