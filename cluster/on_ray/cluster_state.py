"""ClusterMonitor: the nodes of a Ray cluster and the state of its autoscaler, as the head reports them."""

from __future__ import annotations

import importlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from cluster.executors.executor import Resources

ANSWER_SECONDS = 5.0
"""The time limit of one request to the head."""

_NAMES = ("CPU", "GPU", "memory")
"""Ray's names of the resources that workers hold."""


@dataclass(frozen=True)
class Demand:
    """Resources and labels in a form that can be compared: of a request, or of a node."""

    amounts: frozenset[tuple[str, float]]
    labels: frozenset[tuple[str, str]]

    def fits(self, node: Demand) -> bool:
        """Return whether an idle node with these resources and labels could hold this demand."""
        available = dict(node.amounts)
        return self.labels <= node.labels and all(
            amount <= available.get(name, 0.0) for name, amount in self.amounts
        )


@dataclass(frozen=True)
class ClusterSnapshot:
    """The state of a cluster at one time."""

    has_autoscaler: bool
    """Whether an autoscaler reports to the head."""
    autoscaler_saw: float
    """The time up to which the autoscaler has seen requests; -inf if it has seen none of ours."""
    infeasible: Mapping[Demand, int]
    """The requests that the autoscaler cannot place, with their numbers, as of `autoscaler_saw`."""
    dead_nodes: frozenset[str]
    draining_nodes: frozenset[str]
    """Nodes that will soon be taken away."""
    is_busy: bool
    """Whether any process holds resources."""
    nodes: tuple[Demand, ...]
    """The total resources of each node that is up."""
    cpus: int
    resources: str
    """The resources of all nodes that are up, in words."""
    largest_node: str
    """The largest amounts that nodes have had so far, in words; empty if no worker node was up."""

    def has_node_for(self, request: Demand) -> bool:
        """Return whether one of the nodes could hold a request if it were idle."""
        return any(request.fits(node) for node in self.nodes)


class ClusterMonitor:
    """Reads the state of a cluster from its head, and remembers the largest amounts that nodes have had."""

    def __init__(self, ray: ModuleType) -> None:
        self._head = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        self._messages = importlib.import_module("ray.core.generated.autoscaler_pb2")
        self._versions: list[tuple[int, float]] = []
        """The versions of the state that this monitor read, with their times."""
        self._largest: dict[str, float] = {}

    def snapshot(self) -> ClusterSnapshot | None:
        """Return the current state; None if the head does not answer. A lost head ends the workers soon enough."""
        requested_at = time.monotonic()
        reply = self._messages.GetClusterStatusReply()
        try:
            reply.ParseFromString(self._head.get_cluster_status(timeout_s=ANSWER_SECONDS))
        except Exception:  # noqa: BLE001 - Ray's client may raise any exception
            return None
        state, autoscaler = reply.cluster_resource_state, reply.autoscaling_state
        self._versions.append((state.cluster_resource_state_version, requested_at))
        alive = [node for node in state.node_states if node.status != self._messages.DEAD]
        totals = [dict(node.total_resources) for node in alive]
        free = [dict(node.available_resources) for node in alive]
        self._remember_largest(totals)
        sums = dict.fromkeys(_NAMES, 0.0)
        for total in totals:
            for name in _NAMES:
                sums[name] += total.get(name, 0.0)
        plural = "s" * (len(alive) != 1)
        return ClusterSnapshot(
            has_autoscaler=autoscaler.autoscaler_state_version > 0,
            autoscaler_saw=self._time_of(autoscaler.last_seen_cluster_resource_state_version),
            infeasible=Counter(map(_requested, autoscaler.infeasible_resource_requests)),
            dead_nodes=self._with_status(state.node_states, self._messages.DEAD),
            draining_nodes=self._with_status(alive, self._messages.DRAINING),
            is_busy=_is_busy(totals, free),
            nodes=tuple(demand(total, node.labels) for total, node in zip(totals, alive, strict=True)),
            cpus=sum(int(total.get("CPU", 0.0)) for total in totals),
            resources=f"{_in_words(sums)} on {len(alive)} node{plural}",
            largest_node=_in_words(self._largest) if self._largest else "",
        )

    def _time_of(self, version: int) -> float:
        """Return when this monitor read the latest state up to a version, and forget the earlier ones."""
        times = [read_at for read_version, read_at in self._versions if read_version <= version]
        self._versions = self._versions[max(0, len(times) - 1) :]
        if not times:
            return -math.inf
        return times[-1]

    def _remember_largest(self, totals: Sequence[Mapping[str, float]]) -> None:
        for total in totals:
            if total.get("CPU"):  # no worker fits on a node without processors, as most heads are
                self._largest |= {
                    name: max(self._largest.get(name, 0.0), total.get(name, 0.0)) for name in _NAMES
                }

    def _with_status(self, nodes: Iterable[Any], status: object) -> frozenset[str]:
        return frozenset(node.node_id.hex() for node in nodes if node.status == status)


def demand(resources: Mapping[str, float], labels: Mapping[str, str]) -> Demand:
    """Return resources under Ray's names, and labels, as a Demand."""
    amounts = frozenset((name, round(amount, 3)) for name, amount in resources.items() if amount)
    return Demand(amounts, frozenset(labels.items()))


def describe(needs: Resources) -> str:
    """Return the resources that a task requests, in one line."""
    amounts = _in_words({"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_gib * 2**30})
    labels = "".join(f", {key}: {value}" for key, value in needs.labels.items())
    ranks = f"{needs.ranks} × " if needs.ranks > 1 else ""
    return f"{ranks}{amounts}{labels}"


def _requested(request: Any) -> Demand:
    """Return the demand of one of Ray's requests; a label constraint names the value that the label must have."""
    labels: dict[str, str] = {}
    for selector in request.label_selectors[:1]:
        for constraint in selector.label_constraints:
            for value in constraint.label_values:
                labels[constraint.label_key] = value
    return demand(request.resources_bundle, labels)


def _is_busy(totals: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]) -> bool:
    for total, available in zip(totals, free, strict=True):
        if any(total.get(name, 0.0) > available.get(name, 0.0) for name in _NAMES):
            return True
    return False


def _in_words(resources: Mapping[str, float]) -> str:
    amounts = {
        "CPU": resources.get("CPU", 0),
        "GPU": resources.get("GPU", 0),
        "GiB": resources.get("memory", 0) / 2**30,
    }
    return ", ".join(f"{amount:.4g} {name}" for name, amount in amounts.items() if amount) or "nothing"
