"""A Ray's head: how to reach it, and what it tells of its cluster. A door to Ray's core, beside on_ray.py."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.executors.executor import Resources

# Results larger than 100 KB pass through Ray's shared memory; ours are records, files go to the store.
OBJECT_STORE_BYTES = 150 * 2**20
ANSWER_SECONDS = 5.0
"""So long is waited for what the head tells."""


def connect(address: str | None, slots: int | None, gpus: float | None) -> tuple[ModuleType, bool]:
    """Ray, and whether this started it. It is imported only now: it reads its environment once."""
    local = address in (None, "local")
    _authenticate(local)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints each lost worker to our standard output; `wait` reports them.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    # Ray would run workers at a low priority: on a busy machine the timings would tell of the others.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    if not local:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return ray, False
    ray.init(
        address="local", num_cpus=slots, num_gpus=None if gpus is None else math.ceil(gpus),
        include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )  # fmt: skip
    return ray, True


def _authenticate(local: bool) -> None:
    """Say explicitly whether Ray asks for a token: left unset it depends on how it is started.

    A Ray of our own gets a token that only this process and its children know. A cluster has been set up
    by someone: with the token found where Ray looks for it, or without.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    kept = Path.home() / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or kept.exists()
    if local and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token" if local or has_token else "disabled"


Demand = tuple[frozenset[tuple[str, float]], frozenset[tuple[str, str]]]
"""Amounts of resources, and labels: what a worker is to hold, on which nodes."""


@dataclass(frozen=True)
class ClusterSnapshot:
    """What a cluster told of itself. scales: whether its autoscaler reports; refused: how often it cannot place
    what is asked for, as of `seen_at`; gone, leaving: nodes that are, or soon will be; busy: whether anything runs;
    nodes: what each has in all; has: all of them, in words; most: what one has had at most, empty where none was up."""

    scales: bool
    seen_at: float
    refused: Mapping[Demand, int]
    gone: frozenset[str]
    leaving: frozenset[str]
    busy: bool
    nodes: tuple[Demand, ...]
    cpus: int
    has: str
    most: str


class ClusterMonitor:
    """Asks a cluster's head what its nodes and its autoscaler are about, and remembers the most that nodes have had."""

    def __init__(self, ray: ModuleType) -> None:
        self._head = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        self._states = importlib.import_module("ray.core.generated.autoscaler_pb2")
        self._versions: list[tuple[int, float]] = []
        self._most: dict[str, float] = {}

    def seen(self) -> ClusterSnapshot | None:
        """None where the head does not answer now; workers tell soon enough where it is gone."""
        asked = time.monotonic()
        states = self._states
        reply = states.GetClusterStatusReply()
        try:
            reply.ParseFromString(self._head.get_cluster_status(timeout_s=ANSWER_SECONDS))
        except Exception:  # noqa: BLE001 - whatever Ray's client raises
            return None
        state, scaling = reply.cluster_resource_state, reply.autoscaling_state
        self._versions.append((state.cluster_resource_state_version, asked))
        known = [
            at
            for version, at in self._versions
            if version <= scaling.last_seen_cluster_resource_state_version
        ]
        self._versions = self._versions[max(0, len(known) - 1) :]
        alive = [node for node in state.node_states if node.status != states.DEAD]
        total = [dict(node.total_resources) for node in alive]
        free = [dict(node.available_resources) for node in alive]
        names = ("CPU", "GPU", "memory")
        for one in (one for one in total if one.get("CPU")):  # no worker fits elsewhere, as on most heads
            self._most |= {name: max(self._most.get(name, 0.0), one.get(name, 0.0)) for name in names}
        has = {name: sum(one.get(name, 0.0) for one in total) for name in names}
        return ClusterSnapshot(
            scales=scaling.autoscaler_state_version > 0,
            seen_at=known[-1] if known else -math.inf,
            refused=Counter(map(_demanded, scaling.infeasible_resource_requests)),
            gone=frozenset(one.node_id.hex() for one in state.node_states if one.status == states.DEAD),
            leaving=frozenset(one.node_id.hex() for one in alive if one.status == states.DRAINING),
            busy=any(
                had.get(name, 0.0) > left.get(name, 0.0)
                for had, left in zip(total, free, strict=True)
                for name in names
            ),
            nodes=tuple(demand(had, node.labels) for had, node in zip(total, alive, strict=True)),
            cpus=sum(int(one.get("CPU", 0.0)) for one in total),
            has=f"{_amounts(has)} on {len(alive)} node{'s' * (len(alive) != 1)}",
            most=_amounts(self._most) if self._most else "",
        )


def demand(resources: Mapping[str, float], labels: Mapping[str, str]) -> Demand:
    """What Ray is asked for, so that it can be compared."""
    asked = frozenset((name, round(amount, 3)) for name, amount in resources.items() if amount)
    return asked, frozenset(labels.items())


def holds(node: Demand, asked: Demand) -> bool:
    """Whether a node that has so much, and these labels, would hold what is asked for."""
    had = dict(node[0])
    return asked[1] <= node[1] and all(amount <= had.get(name, 0.0) for name, amount in asked[0])


def _demanded(request: Any) -> Demand:
    """What a request of Ray's asks for: of labels, as ours do, that they have a value."""
    constraints = [one for selector in request.label_selectors[:1] for one in selector.label_constraints]
    labels = {one.label_key: value for one in constraints for value in one.label_values}
    return demand(request.resources_bundle, labels)


def _amounts(of: Mapping[str, float]) -> str:
    said = {"CPU": of.get("CPU", 0), "GPU": of.get("GPU", 0), "GiB": of.get("memory", 0) / 2**30}
    return ", ".join(f"{amount:.4g} {name}" for name, amount in said.items() if amount) or "nothing"


def said_of(needs: Resources) -> str:
    """What a piece asks for, in a line."""
    asked = _amounts({"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_gib * 2**30})
    on = "".join(f", {key}: {value}" for key, value in needs.labels.items())
    return f"{needs.ranks} × {asked}{on}" if needs.ranks > 1 else f"{asked}{on}"


def launcher_schema() -> dict[str, Any]:
    """Ray's JSON schema of the files of its cluster launcher, read from where Ray is installed; imports no Ray."""
    file = Path(str(metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema
