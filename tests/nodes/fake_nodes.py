"""The node provider of tests/fake_cluster.py. The head has only this folder on its path."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Ray's provider for tests, with the memory and the group of each node's type, and a folder for jobs on each node.

    With one folder for all nodes, each new node would delete the unpacked package of a running job. Ray reads memory
    and group from the environment of the process that creates the node, which is the autoscaler.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        environment = {
            "RAY_OVERRIDE_RESOURCES": json.dumps({"memory": resources["memory"]}),
            "RAY_NODE_TYPE_NAME": tags["ray-user-node-type"],
        }
        resources_without_memory = {name: amount for name, amount in resources.items() if name != "memory"}
        with (
            self.lock,
            patch.dict(os.environ, environment),
            patch.object(ray_constants, "DEFAULT_RUNTIME_ENV_DIR_NAME", f"unpacked-{self._next_node_id + 1}"),
        ):
            super()._create_node_with_resources_and_labels(
                node_config, tags, count, resources_without_memory, labels
            )
