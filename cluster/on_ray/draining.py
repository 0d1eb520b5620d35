"""Draining: report to a worker that its node will be taken away, and to Ray's head.

A process that takes a node away notifies Ray's head first, with a deadline: `ray start --block` does so at SIGTERM, by
which pods are ended; a worker does so if the cloud gives its machine notice. Ray then places nothing new on the node.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.cloud import preemption
from cluster.cloud.preemption import Notice

_HEAD = "node:__internal_head__"
_TIMEOUT_SECONDS = 5.0
_DEFAULT_SECONDS = 120.0
"""The deadline for Ray if the cloud's notice has none."""


def watch() -> None:
    """Watch for notices by Ray and by the cloud in this worker, and pass a notice by the cloud on to Ray."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    node_id = ray.get_runtime_context().get_node_id()
    # The head is never drained: Ray would end with it. So a Ray on one machine is not polled.
    if any(node["NodeID"] == node_id and _HEAD in node["Resources"] for node in nodes):
        preemption.watch()
    else:
        preemption.watch([_ray_notice], _drain)


def _ray_notice() -> Notice | None:
    """Return a notice if Ray drains the node of this worker."""
    import ray

    try:
        ends_at_ms = _deadlines().get(ray.get_runtime_context().get_node_id())
    except Exception:  # noqa: BLE001 - the head is out of reach
        return None
    if ends_at_ms is None:
        return None
    return Notice("Ray", ends_at_ms / 1000 or None)


def _drain(notice: Notice) -> None:
    """Let Ray drain the node of this worker, unless it does already.

    Ray places nothing new there, and ends the node when no process uses it.
    """
    import ray
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    # These modules have no types.
    ray_worker: Any = worker.global_worker
    messages: Any = autoscaler_pb2
    node_id = ray.get_runtime_context().get_node_id()
    seconds_left = _DEFAULT_SECONDS if notice.seconds_left is None else notice.seconds_left
    try:
        if node_id in _deadlines():
            return
        ray_worker.gcs_client.drain_node(
            node_id,
            messages.DRAIN_NODE_REASON_PREEMPTION,
            f"notice by {notice.source}",
            int((time.time() + seconds_left) * 1000),
            timeout=_TIMEOUT_SECONDS,
        )
    except Exception:  # noqa: BLE001 - the head is out of reach; the task on this worker stops anyway
        return


def _deadlines() -> dict[str, int]:
    """Return the draining nodes with their deadlines in ms since 1970, 0 if there is none. Takes a millisecond."""
    from ray._private.state import state

    deadlines: dict[str, int] = state.get_draining_nodes()
    return deadlines
