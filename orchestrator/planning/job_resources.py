"""The slots, GPUs and memory that a job needs."""

from __future__ import annotations

import math
import os

from orchestrator.config.schema import StudyConfig


def slots_of(config: StudyConfig) -> int:
    """How many jobs run at once on this machine."""
    return os.cpu_count() or 1 if config.cluster.slots == "auto" else int(config.cluster.slots)


def share_of_gpu(memory_gib: float, device_gib: float) -> float:
    """The part of a GPU that a job holds, of which as many share it as its memory holds. Ray counts ten-thousandths."""
    jobs = max(1, math.floor(device_gib / memory_gib))
    return math.floor(10_000 / jobs) / 10_000
