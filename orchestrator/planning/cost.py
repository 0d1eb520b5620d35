"""What a candidate costs: size and operations, computed from its recipe."""

from __future__ import annotations

from pathlib import Path

from jobs import formats, runtimes
from jobs.materials import Target
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table, predict
from orchestrator.study.events import Cost

MAX_CACHED_COSTS, MAX_CACHED_LAYOUTS = 50_000, 500
"""So many are remembered."""


def shipped_as(target: Target) -> str:
    """The format that candidates are written in for a target."""
    return runtimes.load(target.runtime).FORMAT


def cost_of(layout: Layout, target: Target, original: Path, table: Table | None = None) -> Cost:
    """What is known of a model from its shapes, and a table of operations. The size is that of the file for the
    target."""
    try:
        predicted = {} if table is None else predict(layout, table)
    except LookupError:  # an operation that no model of the table did: as without a table
        predicted = {}
    size_bytes = formats.load(shipped_as(target)).size_bytes(layout, original)
    return Cost(size_bytes, layout.decode_macs(), len(layout.linears), predicted)
