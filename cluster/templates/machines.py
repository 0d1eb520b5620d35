"""Check the machine that a launcher's node type starts: its type, its resources, and its spot options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import Any

from cluster.templates import ec2
from cluster.templates.instances import Instance, Table, table
from cluster.templates.schema import nearest
from cluster.templates.yaml_lines import Key, Problem

TYPE_KEY = {"aws": "InstanceType", "gcp": "machineType"}
"""The key of a node_config with the machine type, by cloud."""


def type_of(cloud: str, config: dict[str, Any]) -> str:
    """Return the machine type of a node_config, which GCP allows to be a path; empty if there is none."""
    return str(config.get(TYPE_KEY[cloud], "")).rpartition("/")[2]


def check_machine(cloud: str, node_type: dict[str, Any], at: Key) -> Iterator[Problem]:
    """Check the machine type, and that the machine has the resources which the node type names."""
    config = node_type["node_config"]
    if config.get(TYPE_KEY[cloud]) is None:
        if "LaunchTemplate" not in config:
            yield Problem((*at, "node_config"), f"got no {TYPE_KEY[cloud]}, which must be given")
        return
    name, machine_table = type_of(cloud, config), table(cloud)
    if name not in machine_table.types:
        names = set(machine_table.types)
        if cloud == "aws":
            names |= ec2.instance_types()
        yield _unknown_type(name, names, machine_table.as_of, (*at, "node_config", TYPE_KEY[cloud]))
        return
    instance, attached = machine_table.types[name], _attached_gpus(config)
    available = {
        "CPU": _cpus(instance, config),
        "GPU": instance.gpus + attached,
        "memory": instance.memory_gib * 2**30,
    }
    resources = node_type["resources"]
    for resource, amount in available.items():
        claimed = resources.get(resource, 0)
        if claimed > amount:
            hint = _most_gpus(machine_table, claimed) if resource == "GPU" else ""
            message = f"got {claimed}, but a {name} has {int(amount)}{hint}"
            yield Problem((*at, "resources", resource), message)
    if attached and not name.startswith("n1-"):
        message = f"got GPUs for {name}: only n1 types take attached GPUs"
        yield Problem((*at, "node_config", "guestAccelerators"), message)
    if available["GPU"] and not resources.get("GPU") and cloud == "gcp":
        message = f"got no GPU, but a {name} has {available['GPU']}: no task that needs one would start it"
        yield Problem((*at, "resources"), message)
    if cloud == "gcp" and resources.get("CPU") and "memory" not in resources:
        message = "got no memory, in bytes: a study's jobs request memory, so none would start this type"
        yield Problem((*at, "resources"), message, certain=False)


def check_spot(cloud: str, config: dict[str, Any], at: Key, is_head: bool) -> Iterator[Problem]:
    """Check the options of spot machines, and that the head is not one."""
    config_key = (*at, "node_config")
    if cloud == "aws":
        is_spot, problems = _spot_of_aws(config, config_key)
    else:
        is_spot, problems = _spot_of_gcp(config, config_key)
    yield from problems
    if is_spot and is_head:
        message = "got a head that the cloud may take back at any time: the study would end with it"
        yield Problem(config_key, message, certain=False)


def _unknown_type(name: str, names: Set[str], as_of: str, at: Key) -> Problem:
    """Return the problem of a type that is not in the table.

    It is certainly misspelled if its family has a type of nearly the same name; new families appear every month.
    """
    if name in names:
        message = f"got {name}: its resources are not in the table of {as_of}, CPUs and GPUs are not checked"
        return Problem(at, message, certain=False)
    family = [candidate for candidate in names if _family(candidate) == _family(name)]
    intended = nearest(name, family, 0.8)
    if intended is not None:
        return Problem(at, f"got {name}, expected {intended}")
    similar = nearest(name, names)
    hint = f" (or is it {similar}?)" if similar is not None else ""
    message = f"got {name}, which the table of {as_of} does not have{hint}: CPUs and GPUs are not checked"
    return Problem(at, message, certain=False)


def _family(name: str) -> str:
    return re.split(r"[.-]", name)[0]


def _most_gpus(machine_table: Table, claimed: float) -> str:
    largest = machine_table.most_gpus
    maximum = machine_table.types[largest].gpus
    if claimed <= maximum:
        return ""
    return f" (no type has more than {maximum}: {largest})"


def _cpus(instance: Instance, config: dict[str, Any]) -> int:
    """Return the number of CPUs; options may reduce the threads of each core from two to one."""
    options: dict[str, int] = config.get("CpuOptions", {})
    if {"CoreCount", "ThreadsPerCore"} <= options.keys():
        return min(instance.cpus, options["CoreCount"] * options["ThreadsPerCore"])
    one_thread = config.get("advancedMachineFeatures", {}).get("threadsPerCore") == 1
    if one_thread:
        return instance.cpus // 2
    return instance.cpus


def _attached_gpus(config: dict[str, Any]) -> int:
    accelerators = config.get("guestAccelerators", [])
    return sum(accelerator.get("acceleratorCount", 0) for accelerator in accelerators)


def _spot_of_aws(config: dict[str, Any], at: Key) -> tuple[bool, list[Problem]]:
    """Return whether AWS may take the machine back, and the problems of its options."""
    market = config.get("InstanceMarketOptions")
    if market is None:
        return False, []
    options, options_key = market.get("SpotOptions", {}), (*at, "InstanceMarketOptions", "SpotOptions")
    problems = []
    if options and market.get("MarketType") != "spot":
        problems.append(Problem(options_key, "got spot options without MarketType: spot next to them"))
    behaviour = options.get("InstanceInterruptionBehavior", "terminate")
    if options.get("SpotInstanceType") == "persistent":
        message = "got persistent, expected one-time: AWS would restart machines that the autoscaler ended"
        problems.append(Problem((*options_key, "SpotInstanceType"), message))
    elif behaviour != "terminate":
        message = f"got {behaviour}, expected terminate, the only value that one-time allows"
        problems.append(Problem((*options_key, "InstanceInterruptionBehavior"), message))
    price = options.get("MaxPrice")
    if price is not None and not re.fullmatch(r"\d*\.?\d+", price):
        message = f"got {price}, expected dollars an hour, as in '0.50'"
        problems.append(Problem((*options_key, "MaxPrice"), message))
    if "BlockDurationMinutes" in options:
        message = "got a duration: AWS no longer accepts one for spot machines"
        problems.append(Problem((*options_key, "BlockDurationMinutes"), message))
    return market.get("MarketType") == "spot", problems


def _spot_of_gcp(config: dict[str, Any], at: Key) -> tuple[bool, list[Problem]]:
    """Return whether GCP may take the machine back, and the problems of its options."""
    problems, is_spot, maintenance = [], False, "MIGRATE"
    for key, scheduling in _schedulings(config):
        spot = scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible") is True
        if spot:
            is_spot, maintenance = True, "TERMINATE"  # the default of spot machines
        maintenance = scheduling.get("onHostMaintenance", maintenance)
        if spot and scheduling.get("automaticRestart") is True:
            message = "got true, expected false: a spot machine is not restarted"
            problems.append(Problem((*at, *key, "automaticRestart"), message))
        if spot and maintenance != "TERMINATE":
            message = f"got {maintenance}, expected TERMINATE: a spot machine cannot be moved"
            problems.append(Problem((*at, *key, "onHostMaintenance"), message))
        if "instanceTerminationAction" in scheduling and scheduling.get("provisioningModel") != "SPOT":
            message = "got an action for the end of spot without provisioningModel: SPOT"
            problems.append(Problem((*at, *key, "instanceTerminationAction"), message))
    instance = table("gcp").types.get(type_of("gcp", config))
    if maintenance != "TERMINATE" and (_attached_gpus(config) or (instance is not None and instance.gpus)):
        message = (
            "got a machine with GPUs that may be moved, expected scheduling.onHostMaintenance: TERMINATE"
        )
        problems.append(Problem(at, message))
    return is_spot, problems


def _schedulings(config: dict[str, Any]) -> list[tuple[Key, dict[str, Any]]]:
    """Return the scheduling options with their keys; Ray's examples put them into a list of one."""
    options = config.get("scheduling", {})
    if isinstance(options, list):
        return [(("scheduling", number), item) for number, item in enumerate(options)]
    return [(("scheduling",), options)]
