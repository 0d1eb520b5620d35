"""What a cluster of tests/fake_cluster.py does while a study runs on it: when each node was up, and which did work.

It is seen from outside, by the operating system: nodes are the raylets that live, and a piece of work is the scratch
folder that a worker makes when it starts one and removes when it has ended (orchestrator/worker/work.py). The
folder's name tells the process, and the process descends from its node. The cluster's own
reports are not used. Observed times are late by half of `PERIOD_SECONDS`, at both ends.
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
    """A time in which a node was up: from the start of its raylet's process until it was seen gone. Seconds since the
    epoch."""

    node: str
    began: float
    ended: float


@dataclass(frozen=True)
class Attempt:
    """A piece of work that a worker was seen at."""

    name: str
    node: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Seen:
    """All that was seen of nodes and work."""

    stays: tuple[Stay, ...]
    attempts: tuple[Attempt, ...]

    @property
    def most_nodes(self) -> int:
        """How many nodes were up at once."""
        return max(
            (sum(one.began <= at.began < one.ended for one in self.stays) for at in self.stays), default=0
        )

    @property
    def node_seconds(self) -> float:
        return sum(stay.ended - stay.began for stay in self.stays)

    @property
    def busy_seconds(self) -> float:
        """How long nodes of one slot each were at work; of a piece that several ranks do each node counts."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def lost(self) -> tuple[Attempt, ...]:
        """The attempts that ended with their node: their work was lost, or another attempt had to resume it."""
        ends = {stay.node: stay.ended for stay in self.stays}
        return tuple(one for one in self.attempts if ends[one.node] - one.ended < 2 * PERIOD_SECONDS)

    @property
    def starting(self) -> list[float]:
        """How long each node was up before it was at work."""
        first = {one.node: one.began for one in sorted(self.attempts, key=lambda one: -one.began)}
        return [first[stay.node] - stay.began for stay in self.stays if stay.node in first]

    @property
    def leaving(self) -> list[float]:
        """How long each node was still up after its last work."""
        last = {one.node: one.ended for one in sorted(self.attempts, key=lambda one: one.ended)}
        return [stay.ended - last[stay.node] for stay in self.stays if stay.node in last]

    @property
    def first_work(self) -> float:
        return min(attempt.began for attempt in self.attempts)

    @property
    def last_work(self) -> float:
        return max(attempt.ended for attempt in self.attempts)

    def utilisation(self) -> float:
        """The share of all time in which nodes were up that they were at work: starting a node, importing, waiting for
        work and the idle time before it is let go count against it."""
        return self.busy_seconds / self.node_seconds

    def utilisation_between(self, began: float, ended: float) -> float:
        """The same of some time only."""
        at_work = sum(_shared(one.began, one.ended, began, ended) for one in self.attempts)
        return at_work / sum(_shared(one.began, one.ended, began, ended) for one in self.stays)


def _shared(began: float, ended: float, other_began: float, other_ended: float) -> float:
    return max(0.0, min(ended, other_ended) - max(began, other_began))


@dataclass
class Sightings:
    """Looks at a time, one after the other, put together."""

    stays: dict[str, Stay] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def look(self, now: float, nodes: Iterable[Node], at_work: Mapping[str, str]) -> None:
        """What is seen now: the nodes, and the node of each piece of work by its name."""
        for node in nodes:
            self.stays[node.id] = Stay(node.id, node.began, now)
        for name, id in at_work.items():
            before = self.attempts.get(name)
            began = now - PERIOD_SECONDS / 2 if before is None else before.began
            self.attempts[name] = Attempt(name, id, began, now + PERIOD_SECONDS / 2)

    def seen(self) -> Seen:
        """Work ends with its node at the latest."""
        attempts = (
            replace(one, ended=min(one.ended, self.stays[one.node].ended)) for one in self.attempts.values()
        )
        return Seen(tuple(self.stays.values()), tuple(attempts))


class Watcher:
    """Looks at a cluster until it is closed, in a thread."""

    def __init__(self, cluster: Head, study: str) -> None:
        self._cluster = cluster
        self._study = study
        self._sightings = Sightings()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def close(self) -> Seen:
        self._closed.set()
        self._thread.join()
        return self._sightings.seen()

    def _look_on(self) -> None:
        while not self._closed.wait(PERIOD_SECONDS):
            nodes = self._cluster.nodes()
            folders = folders_of(self._cluster, self._study, "scratch/*~*~*")
            self._sightings.look(time.time(), nodes, at_work([folder.name for folder in folders], nodes))


def at_work(names: Sequence[str], nodes: Sequence[Node]) -> dict[str, str]:
    """The node of each piece of work whose process lives below one of these nodes."""
    raylets = {node.pid: node.id for node in nodes}
    found = {}
    for name in names:
        with contextlib.suppress(psutil.NoSuchProcess):
            for above in psutil.Process(int(name.split("~")[1])).parents():
                if above.pid in raylets:
                    found[name] = raylets[above.pid]
    return found


def folders_of(cluster: Head, study: str, pattern: str) -> list[Path]:
    """What lies below the study's folder, wherever the cluster has unpacked its job. All nodes share these files."""
    sessions = cluster.log.parent / "ray"
    return list(sessions.glob(f"session_2*/runtime_resources/working_dir_files/*/runs/{study}/{pattern}"))
