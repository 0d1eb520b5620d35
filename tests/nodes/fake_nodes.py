"""What makes the nodes of tests/fake_cluster.py. Its folder is the only one that the head has on its path."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Ray's provider for tests, whose nodes have the memory and the group that their type tells. Ray reads both from
    the environment in which a node is described, which here is the autoscaler's."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        told = {
            "RAY_OVERRIDE_RESOURCES": json.dumps({"memory": resources["memory"]}),
            "RAY_NODE_TYPE_NAME": tags["ray-user-node-type"],
        }
        rest = {name: amount for name, amount in resources.items() if name != "memory"}
        with self.lock, patch.dict(os.environ, told):
            super()._create_node_with_resources_and_labels(node_config, tags, count, rest, labels)
