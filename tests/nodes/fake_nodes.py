"""What makes the nodes of tests/fake_cluster.py. Its folder is the only one that the head has on its path."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Ray's provider for tests, whose nodes have the memory and the group that their type tells, and a folder each to
    unpack a job's package in: one for all would be emptied below a job's feet by each node that comes. Ray reads the
    first two from the environment in which a node is described, which here is the autoscaler's."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        told = {
            "RAY_OVERRIDE_RESOURCES": json.dumps({"memory": resources["memory"]}),
            "RAY_NODE_TYPE_NAME": tags["ray-user-node-type"],
        }
        rest = {name: amount for name, amount in resources.items() if name != "memory"}
        with (
            self.lock,
            patch.dict(os.environ, told),
            patch.object(ray_constants, "DEFAULT_RUNTIME_ENV_DIR_NAME", f"unpacked-{self._next_node_id + 1}"),
        ):
            super()._create_node_with_resources_and_labels(node_config, tags, count, rest, labels)
