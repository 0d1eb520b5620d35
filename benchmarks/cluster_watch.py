"""Observe a cluster of tests/fake_cluster.py while a study runs on it: when each node was up, and which nodes worked.

Observations come from the operating system. A node is a live raylet. An attempt is the scratch folder that a worker
creates when it starts a job and removes when the job has ended (orchestrator/worker/work.py). The folder's name
contains the process id, and the process descends from its node. The cluster's reports are not used. Observed times are
late by half of `PERIOD_SECONDS`, at both ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from tests.fake_cluster import Head, Node

PERIOD_SECONDS = 0.5


@dataclass(frozen=True)
class Stay:
    """The period in which a node was up, from the start of its raylet's process to the last observation, in seconds
    since the epoch."""

    node: str
    began: float
    ended: float


@dataclass(frozen=True)
class Attempt:
    """An observed execution of a job by a worker."""

    name: str
    node: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Observations:
    """All observed nodes and attempts."""

    stays: tuple[Stay, ...]
    attempts: tuple[Attempt, ...]

    @property
    def most_nodes(self) -> int:
        """The largest number of nodes that were up at once."""
        largest = 0
        for start in self.stays:
            nodes = sum(stay.began <= start.began < stay.ended for stay in self.stays)
            largest = max(largest, nodes)
        return largest

    @property
    def node_seconds(self) -> float:
        return sum(stay.ended - stay.began for stay in self.stays)

    @property
    def busy_seconds(self) -> float:
        """The working time of all nodes, each of one slot. Each rank of a job counts for its node."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def lost(self) -> tuple[Attempt, ...]:
        """The attempts that ended with their node: their job has to be repeated or resumed."""
        ends = {stay.node: stay.ended for stay in self.stays}
        return tuple(
            attempt for attempt in self.attempts if ends[attempt.node] - attempt.ended < 2 * PERIOD_SECONDS
        )

    @property
    def starting(self) -> list[float]:
        """The seconds between the start of each node and its first attempt."""
        latest_first = sorted(self.attempts, key=lambda attempt: -attempt.began)
        first = {attempt.node: attempt.began for attempt in latest_first}
        return [first[stay.node] - stay.began for stay in self.stays if stay.node in first]

    @property
    def leaving(self) -> list[float]:
        """The seconds between the last attempt of each node and the end of the node."""
        latest_last = sorted(self.attempts, key=lambda attempt: attempt.ended)
        last = {attempt.node: attempt.ended for attempt in latest_last}
        return [stay.ended - last[stay.node] for stay in self.stays if stay.node in last]

    @property
    def first_work(self) -> float:
        return min(attempt.began for attempt in self.attempts)

    @property
    def last_work(self) -> float:
        return max(attempt.ended for attempt in self.attempts)

    def utilisation(self) -> float:
        """The share of the nodes' total time in which they worked. The start of a node, imports, waiting and the idle
        time before its removal count against it."""
        return self.busy_seconds / self.node_seconds

    def utilisation_between(self, began: float, ended: float) -> float:
        """The utilisation between two times."""
        busy = sum(_shared(attempt.began, attempt.ended, began, ended) for attempt in self.attempts)
        return busy / sum(_shared(stay.began, stay.ended, began, ended) for stay in self.stays)


def _shared(began: float, ended: float, other_began: float, other_ended: float) -> float:
    return max(0.0, min(ended, other_ended) - max(began, other_began))


@dataclass
class Recorder:
    """Accumulates successive observations of a cluster."""

    stays: dict[str, Stay] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def record(self, now: float, nodes: Iterable[Node], at_work: Mapping[str, str]) -> None:
        """Add an observation: the nodes, and the node of each attempt by the attempt's name."""
        for node in nodes:
            self.stays[node.id] = Stay(node.id, node.began, now)
        for name, id in at_work.items():
            began = now - PERIOD_SECONDS / 2
            if name in self.attempts:
                began = self.attempts[name].began
            self.attempts[name] = Attempt(name, id, began, now + PERIOD_SECONDS / 2)

    def observations(self) -> Observations:
        """Return all observations. An attempt ends with its node at the latest."""
        attempts = (
            replace(attempt, ended=min(attempt.ended, self.stays[attempt.node].ended))
            for attempt in self.attempts.values()
        )
        return Observations(tuple(self.stays.values()), tuple(attempts))


class Watcher:
    """Observes a cluster in a thread until `close`."""

    def __init__(self, cluster: Head, study: str) -> None:
        self._cluster = cluster
        self._study = study
        self._recorder = Recorder()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._observe, daemon=True)
        self._thread.start()

    def close(self) -> Observations:
        self._closed.set()
        self._thread.join()
        return self._recorder.observations()

    def _observe(self) -> None:
        while not self._closed.wait(PERIOD_SECONDS):
            nodes = self._cluster.nodes()
            folders = folders_of(self._cluster, self._study, "scratch/*~*~*")
            self._recorder.record(time.time(), nodes, at_work([folder.name for folder in folders], nodes))


def at_work(names: Sequence[str], nodes: Sequence[Node]) -> dict[str, str]:
    """Return the node of each attempt whose process descends from one of these nodes."""
    raylets = {node.pid: node.id for node in nodes}
    node_of = {}
    for name in names:
        with contextlib.suppress(psutil.NoSuchProcess):
            for above in psutil.Process(int(name.split("~")[1])).parents():
                if above.pid in raylets:
                    node_of[name] = raylets[above.pid]
    return node_of


def folders_of(cluster: Head, study: str, pattern: str) -> list[Path]:
    """Return the paths that match `pattern` below the study's folder, in every folder that the cluster unpacked for
    its job. All nodes share these files."""
    sessions = cluster.log.parent / "ray"
    return list(sessions.glob(f"session_2*/runtime_resources/working_dir_files/*/runs/{study}/{pattern}"))
