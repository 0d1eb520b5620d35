"""The types of the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.executors.executor import NodeType


def node_type(labels: Mapping[str, str]) -> NodeType:
    """Return the type of a node with these labels.

    The labels of our templates come first, then those that Ray sets on nodes whose type it knows.
    """
    name = labels.get("instance") or labels.get("ray.io/node-group", "")
    region = labels.get("region") or labels.get("ray.io/availability-region", "")
    return NodeType(name, region, "spot" in (labels.get("market"), labels.get("ray.io/market-type")))
