"""Check files of Ray's cluster launcher (`ray up`): by Ray's own schema, and for problems that it does not describe."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cluster.templates import ec2, machines
from cluster.templates.schema import against, unknown
from cluster.templates.yaml_lines import Document, Key, Problem

CLOUDS = ("aws", "gcp")

_PROVIDER_KEYS = {"aws_credentials": {}, "key_pair": {}, "use_external_head_ip": {"type": "boolean"}}
"""Keys of `provider` that Ray reads and its schema does not name."""
_MACHINE_KEYS = ("InstanceType", "CpuOptions", "InstanceMarketOptions", "machineType", "scheduling",
                 "guestAccelerators", "advancedMachineFeatures")  # fmt: skip
"""Keys of a node_config that the checks of machines read; they need these in the right form."""


def check(document: Document) -> list[Problem]:
    """Return all problems of a launcher file."""
    data = document.data
    problems, readable = against(closed(launcher_schema()), data)
    if not readable:
        return problems
    cloud = data["provider"]["type"]
    if cloud not in CLOUDS:
        return [*problems, Problem(("provider", "type"), f"{unknown(cloud, CLOUDS)}: no more is checked")]
    problems += [*_location(data["provider"]), *_worker_counts(data), *_authentication(data)]
    for name, node_type in data.get("available_node_types", {}).items():
        at: Key = ("available_node_types", name)
        is_head = name == data.get("head_node_type")
        problems += _labels(cloud, node_type, data["provider"], at)
        problems += _node_config(cloud, node_type, at, is_head)
    return problems


def launcher_schema() -> dict[str, Any]:
    """Return Ray's JSON schema of launcher files, read from Ray's installation; Ray is not imported."""
    file = Path(str(metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return Ray's schema, which also refuses unknown keys of the provider and of node types."""
    closed_schema = copy.deepcopy(schema)
    provider = closed_schema["properties"]["provider"]
    provider["properties"] |= _PROVIDER_KEYS
    provider["additionalProperties"] = False
    for node_type in closed_schema["properties"]["available_node_types"]["patternProperties"].values():
        node_type["additionalProperties"] = False
        for count in ("min_workers", "max_workers", "idle_timeout_s"):
            node_type["properties"][count]["minimum"] = 0
    return closed_schema


def _location(provider: dict[str, Any]) -> Iterator[Problem]:
    """Check the region, the zones and the project."""
    region, zones = provider.get("region"), provider.get("availability_zone")
    if not region:
        yield Problem(("provider",), "got no region, which must be given")
    elif zones is not None:
        for zone in str(zones).split(","):
            if not re.fullmatch(re.escape(region) + r"-?[a-z]", zone.strip()):
                message = f"got {zone.strip()}, expected a zone of {region}"
                yield Problem(("provider", "availability_zone"), message)
    if provider["type"] == "gcp" and not provider.get("project_id"):
        message = "got no project_id, which must be given: Ray would choose one by itself"
        yield Problem(("provider",), message)


def _labels(cloud: str, node_type: dict[str, Any], provider: dict[str, Any], at: Key) -> Iterator[Problem]:
    """Check that the labels by which a node's price is found agree with the machine that is started."""
    machine = machines.type_of(cloud, node_type["node_config"])
    for label, actual in (("instance", machine), ("region", provider.get("region"))):
        value = node_type.get("labels", {}).get(label, actual)
        if actual and value != actual:
            message = f"got {value}, expected {actual}: the node's price is found by it"
            yield Problem((*at, "labels", label), message)


def _worker_counts(data: dict[str, Any]) -> Iterator[Problem]:
    """Check the head's type, and min_workers and max_workers of each type and of the cluster."""
    types, head = data.get("available_node_types"), data.get("head_node_type")
    if types is None:
        yield Problem((), "got no available_node_types: Ray would start machines of its own choice")
        return
    if head is None:
        yield Problem((), "got no head_node_type, which must be given with available_node_types")
    elif head not in types:
        yield Problem(("head_node_type",), unknown(head, types))
    cluster_maximum = data.get("max_workers", 2)  # Ray's default
    for name, node_type in types.items():
        minimum, maximum = node_type.get("min_workers", 0), node_type.get("max_workers")
        at: Key = ("available_node_types", name)
        if maximum is not None and minimum > maximum:
            message = f"got {minimum}, expected no more than its max_workers, {maximum}"
            yield Problem((*at, "min_workers"), message)
        if maximum is not None and maximum > cluster_maximum:
            message = f"got {maximum}, but all types together may have {cluster_maximum} (max_workers of the cluster)"
            yield Problem((*at, "max_workers"), message, certain=False)
    total = sum(node_type.get("min_workers", 0) for node_type in types.values())
    if total > cluster_maximum:
        message = f"got {cluster_maximum}, expected {total} or more, the sum of all types' min_workers"
        yield Problem(("max_workers",) if "max_workers" in data else (), message)


def _authentication(data: dict[str, Any]) -> Iterator[Problem]:
    """Check that the head requires a token: any process that reaches its Jobs API may run programs on the cluster."""
    start_commands = " ".join(map(str, data.get("head_start_ray_commands", ())))
    docker = data.get("docker", {})
    options = " ".join(map(str, [*docker.get("run_options", ()), *docker.get("head_run_options", ())]))
    if "RAY_AUTH_MODE=token" not in start_commands + options:
        message = (
            "got no RAY_AUTH_MODE=token, here or in docker.run_options: any process that reaches the head may run "
            "programs on the cluster"
        )
        yield Problem(("head_start_ray_commands",) if start_commands else (), message, certain=False)


def _node_config(cloud: str, node_type: dict[str, Any], at: Key, is_head: bool) -> Iterator[Problem]:
    """Check the form of a node_config, then the machine that it starts."""
    config, config_key = node_type["node_config"], (*at, "node_config")
    if cloud == "aws":
        form = ec2.unfit(config, config_key)
    else:
        form, _ = against(_gcp_instance(), config, config_key)
    yield from form
    if any(problem.key[len(config_key)] in _MACHINE_KEYS for problem in form):
        return
    yield from machines.check_spot(cloud, config, at, is_head)
    if not form or machines.TYPE_KEY[cloud] in config:
        yield from machines.check_machine(cloud, node_type, at)


@functools.cache
def _gcp_instance() -> dict[str, Any]:
    text = (files("cluster.templates") / "shipped" / "gcp_instance.yaml").read_text("utf-8")
    schema: dict[str, Any] = yaml.safe_load(text)
    return schema
