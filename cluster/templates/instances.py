"""Machine types of clouds, from a table with a stated date."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

import yaml


@dataclass(frozen=True)
class Instance:
    """The resources of a machine type."""

    cpus: int
    """The number of virtual CPUs, two for each core on most types."""
    memory_gib: float
    gpus: int = 0
    gpu: str | None = None
    """The usual name of its GPU, as L4."""


@dataclass(frozen=True)
class Table:
    """The machine types of one cloud."""

    as_of: str
    """The date of the table, as 2026-11-23."""
    types: Mapping[str, Instance]

    @property
    def most_gpus(self) -> str:
        """The name of the type with the most GPUs."""
        return max(self.types, key=lambda name: self.types[name].gpus)


@functools.cache
def table(cloud: str) -> Table:
    """Return the types of `aws` or `gcp`."""
    content = yaml.safe_load((files("cluster.templates") / "shipped" / "instances.yaml").read_text("utf-8"))
    types = {name: Instance(**row) for name, row in content[cloud].items()}
    return Table(str(content["as_of"]), MappingProxyType(types))
