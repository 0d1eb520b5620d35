"""Files of Ray's cluster launcher (`ray up`): Ray's own schema, and what that lets pass."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Set
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cluster.templates import ec2
from cluster.templates.instances import Instance, table
from cluster.templates.placed import Document, Key, Problem
from cluster.templates.schema import against, nearest, unknown

CLOUDS = ("aws", "gcp")

# What Ray reads of `provider` and its schema does not name.
_READ_TOO = {"aws_credentials": {}, "key_pair": {}, "use_external_head_ip": {"type": "boolean"}}
_TYPE_KEY = {"aws": "InstanceType", "gcp": "machineType"}
# What the checks below read of a node_config; where its form is wrong they would say wrong things.
_READ = ("InstanceType", "CpuOptions", "InstanceMarketOptions", "machineType", "scheduling", "guestAccelerators",
         "advancedMachineFeatures")  # fmt: skip


def check(document: Document) -> list[Problem]:
    """All that is wrong with a launcher's file, or may be."""
    data = document.data
    problems, readable = against(closed(launcher_schema()), data)
    if not readable:
        return problems
    cloud = data["provider"]["type"]
    if cloud not in CLOUDS:
        return [*problems, Problem(("provider", "type"), f"{unknown(cloud, CLOUDS)}: no more is checked")]
    problems += [*_place(data["provider"]), *_numbers(data), *_open(data)]
    for name, node_type in data.get("available_node_types", {}).items():
        at: Key = ("available_node_types", name)
        config, place = node_type["node_config"], (*at, "node_config")
        problems += _labels(cloud, node_type, data["provider"], at)
        form = ec2.unfit(config, place) if cloud == "aws" else against(_gcp_instance(), config, place)[0]
        problems += form
        if all(problem.key[len(place)] not in _READ for problem in form):
            problems += _spot(cloud, config, at, is_head=name == data.get("head_node_type"))
            if not form or _TYPE_KEY[cloud] in config:
                problems += _machine(cloud, node_type, at)
    return problems


def launcher_schema() -> dict[str, Any]:
    """Return Ray's JSON schema of launcher files, read from Ray's installation; Ray is not imported."""
    file = Path(str(metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Ray's schema without the openings by which slips pass: keys of the provider and of node types."""
    tight = copy.deepcopy(schema)
    provider = tight["properties"]["provider"]
    provider["properties"] |= _READ_TOO
    provider["additionalProperties"] = False
    for node_type in tight["properties"]["available_node_types"]["patternProperties"].values():
        node_type["additionalProperties"] = False
        for least in ("min_workers", "max_workers", "idle_timeout_s"):
            node_type["properties"][least]["minimum"] = 0
    return tight


def _place(provider: dict[str, Any]) -> Iterator[Problem]:
    region, zones = provider.get("region"), provider.get("availability_zone")
    if not region:
        yield Problem(("provider",), "got no region, which must be given")
    elif zones is not None:
        for zone in str(zones).split(","):
            if not re.fullmatch(re.escape(region) + r"-?[a-z]", zone.strip()):
                yield Problem(
                    ("provider", "availability_zone"), f"got {zone.strip()}, expected a zone of {region}"
                )
    if provider["type"] == "gcp" and not provider.get("project_id"):
        yield Problem(
            ("provider",), "got no project_id, which must be given: Ray would look for one by itself"
        )


def _labels(cloud: str, node_type: dict[str, Any], provider: dict[str, Any], at: Key) -> Iterator[Problem]:
    """The labels by which a study knows what a node costs, where they say something else than what is started."""
    started = str(node_type["node_config"].get(_TYPE_KEY[cloud], "")).rpartition("/")[2]
    for label, there in (("instance", started), ("region", provider.get("region"))):
        said = node_type.get("labels", {}).get(label, there)
        if there and said != there:
            yield Problem((*at, "labels", label), f"got {said}, expected {there}: by it the node is priced")


def _numbers(data: dict[str, Any]) -> Iterator[Problem]:
    types, head = data.get("available_node_types"), data.get("head_node_type")
    if types is None:
        yield Problem((), "got no available_node_types: Ray would start machines of its own choice")
        return
    if head is None:
        yield Problem((), "got no head_node_type, which must be given with available_node_types")
    elif head not in types:
        yield Problem(("head_node_type",), unknown(head, types))
    most = data.get("max_workers", 2)  # Ray's default
    for name, node_type in types.items():
        least, limit = node_type.get("min_workers", 0), node_type.get("max_workers")
        at: Key = ("available_node_types", name)
        if limit is not None and least > limit:
            yield Problem(
                (*at, "min_workers"), f"got {least}, expected no more than its max_workers, {limit}"
            )
        if limit is not None and limit > most:
            said = f"got {limit}, but all types together may have {most} (max_workers of the cluster)"
            yield Problem((*at, "max_workers"), said, certain=False)
    total = sum(node_type.get("min_workers", 0) for node_type in types.values())
    if total > most:
        said = f"got {most}, expected {total} or more: so many are the min_workers of all types"
        yield Problem(("max_workers",) if "max_workers" in data else (), said)


def _open(data: dict[str, Any]) -> Iterator[Problem]:
    # Whoever reaches the jobs' API may run anything on the cluster.
    started = " ".join(map(str, data.get("head_start_ray_commands", ())))
    docker = data.get("docker", {})
    given = " ".join(map(str, [*docker.get("run_options", ()), *docker.get("head_run_options", ())]))
    if "RAY_AUTH_MODE=token" not in started + given:
        yield Problem(
            ("head_start_ray_commands",) if started else (),
            "got no RAY_AUTH_MODE=token, here or in docker.run_options: whoever reaches the head runs what they like",
            certain=False,
        )


def _machine(cloud: str, node_type: dict[str, Any], at: Key) -> Iterator[Problem]:
    """The instance type, and the resources that are claimed of it."""
    config, known = node_type["node_config"], table(cloud)
    type_key = _TYPE_KEY[cloud]
    place = (*at, "node_config", type_key)
    name = config.get(type_key)
    if name is None:
        if "LaunchTemplate" not in config:
            yield Problem((*at, "node_config"), f"got no {type_key}, which must be given")
        return
    name = str(name).rpartition("/")[2]
    heard_of = known.types.keys() | (ec2.instance_types() if cloud == "aws" else set())
    if name not in known.types:
        yield _unheard(name, heard_of, known.as_of, place)
        return
    instance = known.types[name]
    attached = _attached(config)
    claims = {
        "CPU": _cpus(instance, config),
        "GPU": instance.gpus + attached,
        "memory": instance.memory_gib * 2**30,
    }
    for resource, there in claims.items():
        claimed = node_type["resources"].get(resource, 0)
        if claimed > there:
            most = known.types[known.most_gpus].gpus
            more = (
                f" (no type has more than {most}: {known.most_gpus})"
                if resource == "GPU" and claimed > most
                else ""
            )
            yield Problem((*at, "resources", resource), f"got {claimed}, but a {name} has {int(there)}{more}")
    if attached and not name.startswith("n1-"):
        yield Problem(
            (*at, "node_config", "guestAccelerators"), f"got GPUs for {name}: they go with n1 types alone"
        )
    if claims["GPU"] and not node_type["resources"].get("GPU") and cloud == "gcp":
        said = f"got no GPU, but a {name} has {claims['GPU']}: no work that needs one would start it"
        yield Problem((*at, "resources"), said)
    if cloud == "gcp" and node_type["resources"].get("CPU") and "memory" not in node_type["resources"]:
        said = "got no memory, in bytes: a study's jobs ask for some, and would start none of it"
        yield Problem((*at, "resources"), said, certain=False)


def _unheard(name: str, heard_of: Set[str], as_of: str, at: Key) -> Problem:
    """A slip where the family is known and has nearly that name; families yet unknown are lent every month."""
    if name in heard_of:
        said = f"got {name}: what it has is not in the table of {as_of}, CPUs and GPUs are not checked"
        return Problem(at, said, certain=False)
    family = re.split(r"[.-]", name)[0]
    slip = nearest(name, [one for one in heard_of if re.split(r"[.-]", one)[0] == family], 0.8)
    if slip is not None:
        return Problem(at, f"got {name}, expected {slip}")
    near = nearest(name, heard_of)
    meant = f" (or is it {near}?)" if near is not None else ""
    said = f"got {name}, which the table of {as_of} does not have{meant}: CPUs and GPUs are not checked"
    return Problem(at, said, certain=False)


def _cpus(instance: Instance, config: dict[str, Any]) -> int:
    # With one thread a core there are half as many.
    options: dict[str, int] = config.get("CpuOptions", {})
    if {"CoreCount", "ThreadsPerCore"} <= options.keys():
        return min(instance.cpus, options["CoreCount"] * options["ThreadsPerCore"])
    one_thread = config.get("advancedMachineFeatures", {}).get("threadsPerCore") == 1
    return instance.cpus // 2 if one_thread else instance.cpus


def _attached(config: dict[str, Any]) -> int:
    return sum(one.get("acceleratorCount", 0) for one in config.get("guestAccelerators", []))


@functools.cache
def _gcp_instance() -> dict[str, Any]:
    text = (files("cluster.templates") / "shipped" / "gcp_instance.yaml").read_text("utf-8")
    schema: dict[str, Any] = yaml.safe_load(text)
    return schema


def _schedulings(config: dict[str, Any]) -> list[tuple[Key, dict[str, Any]]]:
    # Ray's examples write it as a list of one.
    given = config.get("scheduling", {})
    if isinstance(given, list):
        return [(("scheduling", number), one) for number, one in enumerate(given)]
    return [(("scheduling",), given)]


def _spot(cloud: str, config: dict[str, Any], at: Key, is_head: bool) -> Iterator[Problem]:
    place = (*at, "node_config")
    if cloud == "aws":
        is_spot, problems = _spot_of_aws(config, place)
    else:
        is_spot, problems = _spot_of_gcp(config, place)
    yield from problems
    if is_spot and is_head:
        yield Problem(
            place, "got a head that may be taken back at any time: the study would end with it", False
        )


def _spot_of_aws(config: dict[str, Any], at: Key) -> tuple[bool, list[Problem]]:
    market = config.get("InstanceMarketOptions")
    if market is None:
        return False, []
    at, problems = (*at, "InstanceMarketOptions"), []
    options = market.get("SpotOptions", {})
    if options and market.get("MarketType") != "spot":
        problems.append(
            Problem((*at, "SpotOptions"), "got spot options without MarketType: spot beside them")
        )
    at = (*at, "SpotOptions")
    if options.get("SpotInstanceType") == "persistent":
        said = "got persistent, expected one-time: AWS would start again what the autoscaler ended"
        problems.append(Problem((*at, "SpotInstanceType"), said))
    elif options.get("InstanceInterruptionBehavior", "terminate") != "terminate":
        said = f"got {options['InstanceInterruptionBehavior']}, expected terminate: nothing else goes with one-time"
        problems.append(Problem((*at, "InstanceInterruptionBehavior"), said))
    price = options.get("MaxPrice")
    if price is not None and not re.fullmatch(r"\d*\.?\d+", price):
        problems.append(Problem((*at, "MaxPrice"), f"got {price}, expected dollars an hour, as in '0.50'"))
    if "BlockDurationMinutes" in options:
        problems.append(
            Problem((*at, "BlockDurationMinutes"), "got a duration: AWS takes none for spot any more")
        )
    return market.get("MarketType") == "spot", problems


def _spot_of_gcp(config: dict[str, Any], at: Key) -> tuple[bool, list[Problem]]:
    problems, is_spot, moved = [], False, "MIGRATE"
    for key, scheduling in _schedulings(config):
        spot = scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible") is True
        is_spot, moved = is_spot or spot, scheduling.get("onHostMaintenance", "TERMINATE" if spot else moved)
        if spot and scheduling.get("automaticRestart") is True:
            said = "got true, expected false: what may be taken back is not started again"
            problems.append(Problem((*at, *key, "automaticRestart"), said))
        if spot and moved != "TERMINATE":
            said = f"got {moved}, expected TERMINATE: what may be taken back is not moved"
            problems.append(Problem((*at, *key, "onHostMaintenance"), said))
        if "instanceTerminationAction" in scheduling and scheduling.get("provisioningModel") != "SPOT":
            said = "got an action for the end of spot without provisioningModel: SPOT"
            problems.append(Problem((*at, *key, "instanceTerminationAction"), said))
    name = str(config.get("machineType", "")).rpartition("/")[2]
    instance = table("gcp").types.get(name)
    if moved != "TERMINATE" and (_attached(config) or (instance is not None and instance.gpus)):
        said = "got a machine with GPUs that may be moved, expected scheduling.onHostMaintenance: TERMINATE"
        problems.append(Problem(at, said))
    return is_spot, problems
