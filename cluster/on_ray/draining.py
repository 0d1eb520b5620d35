"""Draining: how a worker learns that its node is to go, and how Ray's head does. A door to the state of Ray's core.

Who takes a node away tells Ray's head first, with a deadline: `ray start --block` does so at SIGTERM, by which pods are
ended, and here a worker does whose cloud gives it notice. Ray then places nothing new there.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.cloud import preemption
from cluster.cloud.preemption import Notice

_HEAD = "node:__internal_head__"
_TIMEOUT_SECONDS = 5.0
_UNTOLD_SECONDS = 120.0
"""The deadline that Ray is told where the cloud tells none."""


def watch() -> None:
    """Let this worker be told when its node is to go, by Ray or by the cloud, and Ray when it is by the cloud."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    # The head is never drained: Ray would end with it. And a Ray on one machine is not asked again and again.
    if any(node["NodeID"] == here and _HEAD in node["Resources"] for node in nodes):
        preemption.watch()
    else:
        preemption.watch([_notice], _drain)


def _notice() -> Notice | None:
    """That the node of this worker drains."""
    import ray

    try:
        ends_at_ms = _deadlines().get(ray.get_runtime_context().get_node_id())
    except Exception:  # noqa: BLE001 - the head is out of reach
        return None
    return None if ends_at_ms is None else Notice("Ray", ends_at_ms / 1000 or None)


def _drain(notice: Notice) -> None:
    """Have Ray drain the node of this worker, unless it does already: nothing new is placed there, and it ends when
    all have let go of it."""
    import ray
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    # What ships no types is taken as it is.
    head: Any = worker.global_worker
    reasons: Any = autoscaler_pb2
    here = ray.get_runtime_context().get_node_id()
    seconds_left = _UNTOLD_SECONDS if notice.seconds_left is None else notice.seconds_left
    try:
        if here in _deadlines():
            return
        head.gcs_client.drain_node(
            here,
            reasons.DRAIN_NODE_REASON_PREEMPTION,
            f"notice by {notice.source}",
            int((time.time() + seconds_left) * 1000),
            timeout=_TIMEOUT_SECONDS,
        )
    except Exception:  # noqa: BLE001 - the head is out of reach; the work here stops all the same
        return


def _deadlines() -> dict[str, int]:
    """The nodes that drain, each with its deadline in ms since 1970, 0 where there is none; asked in a millisecond."""
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes()
    return found
