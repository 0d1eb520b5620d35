"""Check manifests for the KubeRay operator: by a closed schema, and for problems that no schema describes."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from cluster.templates.instances import table
from cluster.templates.schema import against, unknown
from cluster.templates.yaml_lines import Document, Key, Problem

KINDS = ("RayCluster", "RayJob")

_WORDS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "flag": {"type": "boolean"},
    "whole": {"type": "integer"},
    "count": {"type": "integer", "minimum": 0},
    "number": {"type": "number"},
    "quantity": {"type": ["string", "number"]},
    "texts": {"type": "object", "patternProperties": {".*": {"type": "string"}}},
    "quantities": {"type": "object", "patternProperties": {".*": {"type": ["string", "number"]}}},
    "any": {},
}
"""The schema of each word that shipped/kuberay.yaml uses for a value."""
_GPU = "nvidia.com/gpu"
_INSTANCE_LABEL = "node.kubernetes.io/instance-type"
_LONGEST_NAME = {"RayCluster": 52, "RayJob": 47}
"""KubeRay adds suffixes to these names; Kubernetes allows 63 characters."""
_FIRST_WITH_TOKENS = (2, 52)
_FIRST_WITH_AUTOSCALER_V2 = (2, 10)


def check(document: Document) -> list[Problem]:
    """Return all problems of a RayCluster or a RayJob."""
    kind = document.data.get("kind")
    if kind not in KINDS:
        return [Problem(("kind",), f"{unknown(kind, KINDS)}: not checked", certain=False)]
    problems, readable = against(schema(kind), document.data)
    if not readable:
        return problems
    problems += _name(document.data["metadata"], kind)
    spec = document.data["spec"]
    if kind == "RayCluster":
        return problems + _cluster(spec, ("spec",))
    problems += _job(spec)
    if "rayClusterSpec" in spec:
        problems += _cluster(spec["rayClusterSpec"], ("spec", "rayClusterSpec"))
    return problems


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a kind. It is closed: unknown keys are refused."""
    content = yaml.safe_load((files("cluster.templates") / "shipped" / "kuberay.yaml").read_text("utf-8"))
    return _object(content, kind)


def _object(content: dict[str, Any], name: str) -> dict[str, Any]:
    keys = {key.removesuffix("!"): _value(content, value) for key, value in content[name].items()}
    required = [key.removesuffix("!") for key in content[name] if key.endswith("!")]
    return {"type": "object", "properties": keys, "required": required, "additionalProperties": False}


def _value(content: dict[str, Any], value: str | list[str]) -> dict[str, Any]:
    if isinstance(value, list):
        return {"type": "array", "items": _value(content, value[0])}
    if value in _WORDS:
        return _WORDS[value]
    if value in content:
        return _object(content, value)
    return {"enum": value.split("|")}


def _name(metadata: dict[str, Any], kind: str) -> Iterator[Problem]:
    name = metadata.get("name")
    if name is None:
        if "generateName" not in metadata:
            yield Problem(("metadata",), "got no name, which must be given")
    elif not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME[kind]:
        message = f"got {name}, expected at most {_LONGEST_NAME[kind]} of a-z, 0-9 and -, a letter first"
        yield Problem(("metadata", "name"), message)


def _job(spec: dict[str, Any]) -> Iterator[Problem]:
    at: Key = ("spec",)
    remains = not spec.get("shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished") and remains:
        message = "got a time to live, but no shutdownAfterJobFinishes: true; KubeRay refuses that"
        yield Problem((*at, "ttlSecondsAfterFinished"), message)
    elif remains and "clusterSelector" not in spec:
        message = "got no shutdownAfterJobFinishes: true: the cluster would stay, and cost"
        yield Problem(at, message, certain=False)
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield Problem(at, "expected either rayClusterSpec or clusterSelector")
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        yield Problem(at, "got no entrypoint, which must be given: the command to run")
    if spec.get("activeDeadlineSeconds") == 0:
        yield Problem((*at, "activeDeadlineSeconds"), "got 0, expected 1 or more")


def _cluster(spec: dict[str, Any], at: Key) -> list[Problem]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    version = spec.get("rayVersion")
    problems = [*_versions(spec, at), *_group(head, version, (*at, "headGroupSpec"))]
    for number, group in enumerate(groups):
        group_key: Key = (*at, "workerGroupSpecs", number)
        problems += [*_replicas(group, group_key), *_group(group, version, group_key)]
    for name, times in Counter(group["groupName"] for group in groups).items():
        if times > 1:
            problems.append(Problem((*at, "workerGroupSpecs"), f"got {times} groups of the name {name}"))
    return problems


def _versions(spec: dict[str, Any], at: Key) -> Iterator[Problem]:
    """Check that this version of Ray has tokens, if they are required, and the autoscaler that is named."""
    version = spec.get("rayVersion")
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
    mode = spec.get("authOptions", {}).get("mode")
    if mode == "token" and numbers < _FIRST_WITH_TOKENS:
        message = f"got token with rayVersion {version}, expected 2.52.0 or later"
        yield Problem((*at, "authOptions", "mode"), message)
    elif mode != "token":
        message = "got no authOptions.mode: token: any process that reaches the head may run programs on the cluster"
        yield Problem((*at, "authOptions") if "authOptions" in spec else at, message, certain=False)
    scales, options = spec.get("enableInTreeAutoscaling"), spec.get("autoscalerOptions", {})
    if options and not scales:
        message = "got options without enableInTreeAutoscaling: true: they do nothing"
        yield Problem((*at, "autoscalerOptions"), message)
    if scales and options.get("version") == "v2" and numbers < _FIRST_WITH_AUTOSCALER_V2:
        message = f"got v2 with rayVersion {version}, expected 2.10.0 or later"
        yield Problem((*at, "autoscalerOptions", "version"), message)


def _replicas(group: dict[str, Any], at: Key) -> Iterator[Problem]:
    minimum, maximum = group.get("minReplicas", 0), group.get("maxReplicas")
    if maximum is not None and minimum > maximum:
        message = f"got {minimum}, expected no more than its maxReplicas, {maximum}"
        yield Problem((*at, "minReplicas"), message)
    elif "replicas" in group and not minimum <= group["replicas"] <= (maximum or group["replicas"]):
        message = f"got {group['replicas']}, expected {minimum} to {maximum}, its minReplicas to maxReplicas"
        yield Problem((*at, "replicas"), message)


def _group(group: dict[str, Any], version: str | None, at: Key) -> Iterator[Problem]:
    """Check the pod of a group: its version of Ray, its GPUs and its volumes."""
    pod, pod_key = group["template"]["spec"], (*at, "template", "spec")
    if not pod["containers"]:
        yield Problem((*pod_key, "containers"), "got none, expected one that runs Ray")
        return
    yield from _image(pod, version, pod_key)
    container_key = (*pod_key, "containers", 0)
    yield from _gpu_requests(pod, (*container_key, "resources"))
    limit = _gpu_limit(pod)
    if not limit.isdigit():
        return
    yield from _gpus(group, int(limit), at)
    yield from _volumes(pod, (*container_key, "volumeMounts"))


def _image(pod: dict[str, Any], version: str | None, pod_key: Key) -> Iterator[Problem]:
    image = pod["containers"][0]["image"]
    tag = re.fullmatch(r"(?:.*/)?ray:(\d+\.\d+\.\d+).*", image)
    if tag and version is not None and tag[1] != version:
        message = f"got Ray {tag[1]}, expected {version}, the rayVersion: Ray refuses others"
        yield Problem((*pod_key, "containers", 0, "image"), message)


def _gpu_limit(pod: dict[str, Any]) -> str:
    return str(pod["containers"][0].get("resources", {}).get("limits", {}).get(_GPU, 0))


def _gpu_requests(pod: dict[str, Any], at: Key) -> Iterator[Problem]:
    limit = _gpu_limit(pod)
    requested = str(pod["containers"][0].get("resources", {}).get("requests", {}).get(_GPU, limit))
    if requested != limit:
        message = f"got {requested}, expected the number under limits, {limit}: Kubernetes refuses others"
        yield Problem((*at, "requests", _GPU), message)
    if not limit.isdigit():
        message = f"got {limit}, expected a whole number: pods cannot share a GPU"
        yield Problem((*at, "limits", _GPU), message)


def _gpus(group: dict[str, Any], gpus: int, at: Key) -> Iterator[Problem]:
    """Compare the GPUs of the pod with those that Ray is told, and with those of the node's type."""
    resources, parameters = group.get("resources", {}), group.get("rayStartParams", {})
    claimed = resources.get("GPU", parameters.get("num-gpus"))
    if claimed is not None and float(claimed) > gpus:
        key: Key = ("resources", "GPU") if "GPU" in resources else ("rayStartParams", "num-gpus")
        yield Problem((*at, *key), f"got {claimed}, but the pod has {gpus} ({_GPU} under limits)")
    name = group["template"]["spec"].get("nodeSelector", {}).get(_INSTANCE_LABEL)
    types = {**table("aws").types, **table("gcp").types}
    if name in types and gpus > types[name].gpus and not name.startswith("n1-"):
        limit_key = (*at, "template", "spec", "containers", 0, "resources", "limits", _GPU)
        yield Problem(limit_key, f"got {gpus}, but a {name} has {types[name].gpus}")


def _volumes(pod: dict[str, Any], at: Key) -> Iterator[Problem]:
    names = [volume["name"] for volume in pod.get("volumes", [])]
    for number, mount in enumerate(pod["containers"][0].get("volumeMounts", [])):
        if mount["name"] not in names:
            message = f"got {mount['name']}, which is none of the pod's volumes"
            yield Problem((*at, number, "name"), message)
