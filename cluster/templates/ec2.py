"""Check node_configs by botocore's description of EC2's requests. Sends no request, needs no account."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from botocore.session import Session

from cluster.templates.schema import unknown
from cluster.templates.yaml_lines import Key, Problem

_RAY_KEYS = ("SubnetIds",)
"""Keys that are Ray's, not EC2's: Ray sets SubnetId to one of these."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "structure": dict, "list": list, "map": dict, "string": str, "integer": int, "long": int, "boolean": bool,
    "float": (int, float), "double": (int, float),
}  # fmt: skip


def unfit(node_config: dict[str, Any], at: Key) -> list[Problem]:
    """Return the problems of the form of a node_config: unknown keys, wrong types, unknown constants.

    Values that EC2 looks up (images, subnets, instance types) are not checked.
    """
    parameters = {name: value for name, value in node_config.items() if name not in _RAY_KEYS}
    return _unfit(parameters, _input_shape(), at)


@functools.cache
def instance_types() -> frozenset[str]:
    """Return all instance types that this version of botocore lists."""
    return frozenset(_input_shape().members["InstanceType"].enum)


@functools.cache
def _input_shape() -> Any:
    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _unfit(value: Any, shape: Any, at: Key) -> list[Problem]:
    expected = _TYPES.get(shape.type_name)
    is_wrong_bool = isinstance(value, bool) and expected is not bool
    if expected is not None and (is_wrong_bool or not isinstance(value, expected)):
        return [Problem(at, f"got {value!r}, expected {shape.type_name}")]
    if shape.type_name == "structure":
        return _unfit_structure(value, shape, at)
    if shape.type_name == "list":
        problems: list[Problem] = []
        for number, item in enumerate(value):
            problems += _unfit(item, shape.member, (*at, number))
        return problems
    if shape.name != "InstanceType" and getattr(shape, "enum", None) and value not in shape.enum:
        return [Problem(at, unknown(value, shape.enum))]
    return []


def _unfit_structure(value: Mapping[str, Any], shape: Any, at: Key) -> list[Problem]:
    problems = [
        Problem((*at, name), unknown(name, shape.members)) for name in value if name not in shape.members
    ]
    for name in value:
        if name in shape.members:
            problems += _unfit(value[name], shape.members[name], (*at, name))
    return problems
