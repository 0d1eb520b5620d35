"""The workers of a Ray cluster whose size does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.executors.executor import Capacity, cores

LOCAL_NODE = "this machine"
"""The node of all workers of a Ray of this machine."""


def fixed_capacity(
    have: Mapping[str, float], slots: int | None, memory_gib: float | None, gpus: float | None
) -> tuple[Capacity, float]:
    """What a Ray of this machine gives, and the share of GPUs that each worker of it holds."""
    count = int(slots or max(1, have.get("CPU", 1)))
    share = (have.get("GPU", 0.0) if gpus is None else gpus) / count
    memory = have.get("memory", math.inf) / 2**30 if memory_gib is None else memory_gib
    return Capacity(count, max(count, have.get("CPU", 1), cores()), memory, share), share
