"""What EC2 takes to start an instance, as botocore describes it. Asks nobody, needs no account."""

from __future__ import annotations

import functools
from typing import Any

from botocore.session import Session

from cluster.templates.placed import Key, Problem
from cluster.templates.schema import unknown

# Not EC2's: Ray takes one of them for SubnetId.
_RAYS = ("SubnetIds",)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "structure": dict, "list": list, "map": dict, "string": str, "integer": int, "long": int, "boolean": bool,
    "float": (int, float), "double": (int, float),
}  # fmt: skip


def unfit(node_config: dict[str, Any], at: Key) -> list[Problem]:
    """What EC2 would refuse of the form of a node_config: unknown keys, wrong types, words that it does not know.

    Not: values that it looks up (images, subnets, instance types).
    """
    asked = {name: value for name, value in node_config.items() if name not in _RAYS}
    return _unfit(asked, _input(), at)


@functools.cache
def instance_types() -> frozenset[str]:
    """All that this version of botocore has heard of."""
    return frozenset(_input().members["InstanceType"].enum)


@functools.cache
def _input() -> Any:
    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _unfit(given: Any, shape: Any, at: Key) -> list[Problem]:
    expected = _TYPES.get(shape.type_name)
    is_bool = isinstance(given, bool) and expected is not bool
    if expected is not None and (is_bool or not isinstance(given, expected)):
        return [Problem(at, f"got {given!r}, expected {shape.type_name}")]
    if shape.type_name == "structure":
        known = [name for name in given if name in shape.members]
        return [
            *(Problem((*at, name), unknown(name, shape.members)) for name in given if name not in known),
            *(p for name in known for p in _unfit(given[name], shape.members[name], (*at, name))),
        ]
    if shape.type_name == "list":
        return [p for number, one in enumerate(given) for p in _unfit(one, shape.member, (*at, number))]
    if shape.name != "InstanceType" and getattr(shape, "enum", None) and given not in shape.enum:
        return [Problem(at, unknown(given, shape.enum))]
    return []
