"""The types of node that a Ray cluster has."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.executors.executor import NodeType


def node_type(labels: Mapping[str, str]) -> NodeType:
    """What kind of machine a node of these labels is: by those of our templates, else by those that Ray sets where the
    cluster tells it."""
    name = labels.get("instance") or labels.get("ray.io/node-group", "")
    region = labels.get("region") or labels.get("ray.io/availability-region", "")
    return NodeType(name, region, "spot" in (labels.get("market"), labels.get("ray.io/market-type")))
