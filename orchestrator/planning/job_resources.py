"""Decide the slots, GPUs and memory that a job needs."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping

import torch

from cluster.executors.executor import Resources
from jobs import parallel
from jobs.job import Job
from jobs.models import memory
from jobs.models.layout import Layout
from jobs.parallel import WORKER_GIB, Sharing
from jobs.technique import Technique
from orchestrator.config.schema import ClusterSpec, StudyConfig, unless_auto
from orchestrator.planning.prepared_study import PreparedStudy

_BYTES_PER_WEIGHT, _BYTES_PER_WEIGHT_WITH_GRADIENTS = 6, 12
"""A model in bf16 with its statistics and one layer in fp32 takes about 4 bytes a weight more than its file. Squared
gradients are summed in fp32, next to activations."""


class JobResources:
    """The resources of the jobs of one study."""

    def __init__(self, cluster: ClusterSpec, layout: Layout, timers: Collection[str]) -> None:
        """layout: of the original. timers: the meters that need a machine for themselves."""
        self._cluster, self._timers = cluster, frozenset(timers)
        self._weights = layout.parameters()
        self._sharing = sharing_of(cluster)
        self._device_gib = math.inf if self._sharing.device_gib is None else self._sharing.device_gib

    @staticmethod
    def for_study(prepared: PreparedStudy) -> JobResources:
        return JobResources(prepared.config.cluster, prepared.layout, prepared.plan.timers)

    def of(self, job: Job, exclusive: bool, slots: int) -> Resources:
        """The resources that a job requests from the executor, which has this many slots.

        Timings hold no GPU, since timers run on CPUs. On a cluster they run on the nodes that the study names.
        """
        ranks = self.ranks(job, slots)
        memory_gib = self.memory_gib(job, ranks)
        if self._is_timing(job):
            labels: Mapping[str, str] = {}
            if self._cluster.address:
                labels = self._cluster.timing
            return Resources(0.0, 1.0, memory_gib, ranks, exclusive, labels)
        return Resources(self._gpus(memory_gib), 1.0, memory_gib, ranks, exclusive)

    def memory_gib(self, job: Job, ranks: int = 1) -> float:
        """The estimated memory of a job, or of each of its ranks, from the size of the original."""
        step = _last_step(job)
        if step is not None and step.trains():
            stage = self._sharing.stage(self._weights, ranks, self._device_gib, step.highest_stage)
            return round(parallel.training_gib(self._weights, stage, ranks), 3)
        per_weight = _BYTES_PER_WEIGHT
        if step is not None and "gradients" in step.needs:
            per_weight = _BYTES_PER_WEIGHT_WITH_GRADIENTS
        return round(WORKER_GIB + per_weight * self._weights / 2**30, 3)

    def ranks(self, job: Job, slots: int) -> int:
        """The number of slots that a job takes. A training takes as many as the study says, or as few as can hold it.
        Any other job, and a job whose model exists already, takes one."""
        step = _last_step(job)
        only_measures = job.before is not None or self._is_timing(job)
        if step is None or not step.trains() or only_measures:
            return 1
        requested = unless_auto(self._cluster.ranks)
        if requested is not None:
            return int(requested)
        if self._sharing.device_gib is None:
            return 1
        return parallel.ranks_for(self._weights, self._device_gib, slots, step.highest_stage)

    def _gpus(self, memory_gib: float) -> float:
        """The GPUs that a job, or each of its ranks, holds on a cluster."""
        if self._cluster.address is None:
            return 0.0
        gpus = unless_auto(self._cluster.gpus)
        if gpus is None:
            return share_of_gpu(memory_gib, self._device_gib)
        return float(gpus)

    def _is_timing(self, job: Job) -> bool:
        return not self._timers.isdisjoint(job.meters)


def _last_step(job: Job) -> Technique | None:
    """Return the last step of a job's recipe; None for the original."""
    if job.recipe.steps:
        return job.recipe.steps[-1]
    return None


def sharing_of(cluster: ClusterSpec) -> Sharing:
    """How trainings are spread over ranks. The memory of a device is the one that the study states, or that of a GPU
    of this machine; None if neither is there."""
    stage, rows = unless_auto(cluster.zero_stage), unless_auto(cluster.micro_batch)
    device_gib = unless_auto(cluster.device_gib)
    if device_gib is None and torch.cuda.is_available():
        device_gib = memory.device_gib()
    return Sharing(stage, rows, device_gib)


def local_slots(config: StudyConfig) -> int:
    """The number of jobs that run at once on this machine."""
    slots = unless_auto(config.cluster.slots)
    if slots is None:
        return os.cpu_count() or 1
    return slots


def share_of_gpu(memory_gib: float, device_gib: float) -> float:
    """The part of a GPU that a job holds, so that as many jobs share it as its memory can hold. It is rounded down to
    ten-thousandths, the unit in which Ray counts."""
    jobs = max(1, math.floor(device_gib / memory_gib))
    return math.floor(10_000 / jobs) / 10_000
