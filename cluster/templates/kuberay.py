"""Manifests for the KubeRay operator: a closed schema of what they may say, and what no schema can tell."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from cluster.templates.instances import table
from cluster.templates.placed import Document, Key, Problem
from cluster.templates.schema import against, unknown

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
_GPU = "nvidia.com/gpu"
_INSTANCE_LABEL = "node.kubernetes.io/instance-type"
# KubeRay lengthens the names of what it makes; Kubernetes stops at 63 characters.
_LONGEST_NAME = {"RayCluster": 52, "RayJob": 47}
_FIRST_WITH_TOKENS = (2, 52)
_FIRST_WITH_AUTOSCALER_V2 = (2, 10)


def check(document: Document) -> list[Problem]:
    """All that is wrong with a RayCluster or a RayJob, or may be."""
    kind = document.data.get("kind")
    if kind not in KINDS:
        return [Problem(("kind",), f"{unknown(kind, KINDS)}: not checked", certain=False)]
    problems, readable = against(schema(kind), document.data)
    if not readable:
        return problems
    problems += _name(document.data["metadata"], kind)
    spec = document.data["spec"]
    if kind == "RayJob":
        problems += _job(spec)
        return problems + (
            _cluster(spec["rayClusterSpec"], ("spec", "rayClusterSpec")) if "rayClusterSpec" in spec else []
        )
    return problems + _cluster(spec, ("spec",))


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind, closed: a key that it does not name is refused."""
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
    return _object(content, value) if value in content else {"enum": value.split("|")}


def _name(metadata: dict[str, Any], kind: str) -> Iterator[Problem]:
    name = metadata.get("name")
    if name is None:
        if "generateName" not in metadata:
            yield Problem(("metadata",), "got no name, which must be given")
    elif not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME[kind]:
        said = f"got {name}, expected at most {_LONGEST_NAME[kind]} of a-z, 0-9 and -, a letter first"
        yield Problem(("metadata", "name"), said)


def _job(spec: dict[str, Any]) -> Iterator[Problem]:
    at: Key = ("spec",)
    stays = not spec.get("shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished") and stays:
        said = "got a time to live, but no shutdownAfterJobFinishes: true; KubeRay refuses that"
        yield Problem((*at, "ttlSecondsAfterFinished"), said)
    elif stays and "clusterSelector" not in spec:
        yield Problem(
            at, "got no shutdownAfterJobFinishes: true: the cluster would stay, and cost", certain=False
        )
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
        place: Key = (*at, "workerGroupSpecs", number)
        problems += [*_replicas(group, place), *_group(group, version, place)]
    for name, times in Counter(group["groupName"] for group in groups).items():
        if times > 1:
            problems.append(Problem((*at, "workerGroupSpecs"), f"got {times} groups of the name {name}"))
    return problems


def _versions(spec: dict[str, Any], at: Key) -> Iterator[Problem]:
    version = spec.get("rayVersion")
    known = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
    mode = spec.get("authOptions", {}).get("mode")
    if mode == "token" and known < _FIRST_WITH_TOKENS:
        yield Problem(
            (*at, "authOptions", "mode"), f"got token with rayVersion {version}, expected 2.52.0 or later"
        )
    elif mode != "token":
        said = "got no authOptions.mode: token: whoever reaches the head runs what they like"
        yield Problem((*at, "authOptions") if "authOptions" in spec else at, said, certain=False)
    scales, options = spec.get("enableInTreeAutoscaling"), spec.get("autoscalerOptions", {})
    if options and not scales:
        said = "got options without enableInTreeAutoscaling: true: they do nothing"
        yield Problem((*at, "autoscalerOptions"), said)
    if scales and options.get("version") == "v2" and known < _FIRST_WITH_AUTOSCALER_V2:
        said = f"got v2 with rayVersion {version}, expected 2.10.0 or later"
        yield Problem((*at, "autoscalerOptions", "version"), said)


def _replicas(group: dict[str, Any], at: Key) -> Iterator[Problem]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas")
    if most is not None and least > most:
        yield Problem((*at, "minReplicas"), f"got {least}, expected no more than its maxReplicas, {most}")
    elif "replicas" in group and not least <= group["replicas"] <= (most or group["replicas"]):
        said = f"got {group['replicas']}, expected {least} to {most}, its minReplicas to maxReplicas"
        yield Problem((*at, "replicas"), said)


def _group(group: dict[str, Any], version: str | None, at: Key) -> Iterator[Problem]:
    """Ray's version, and GPUs of the pod, of Ray and of the node's type against each other."""
    pod, in_pod = group["template"]["spec"], (*at, "template", "spec")
    if not pod["containers"]:
        yield Problem((*in_pod, "containers"), "got none, expected one that runs Ray")
        return
    image = pod["containers"][0]["image"]
    tagged = re.fullmatch(r"(?:.*/)?ray:(\d+\.\d+\.\d+).*", image)
    if tagged and version is not None and tagged[1] != version:
        said = f"got Ray {tagged[1]}, expected {version}, the rayVersion: Ray refuses others"
        yield Problem((*in_pod, "containers", 0, "image"), said)
    resources, place = pod["containers"][0].get("resources", {}), (*in_pod, "containers", 0, "resources")
    limit = str(resources.get("limits", {}).get(_GPU, 0))
    asked = str(resources.get("requests", {}).get(_GPU, limit))
    if asked != limit:
        said = f"got {asked}, expected what stands under limits, {limit}: Kubernetes refuses others"
        yield Problem((*place, "requests", _GPU), said)
    if not limit.isdigit():
        yield Problem(
            (*place, "limits", _GPU), f"got {limit}, expected a whole number: GPUs are not shared out"
        )
        return
    gpus = int(limit)
    claimed = group.get("resources", {}).get("GPU", group.get("rayStartParams", {}).get("num-gpus"))
    if claimed is not None and float(claimed) > gpus:
        where: Key = (
            ("resources", "GPU") if "GPU" in group.get("resources", {}) else ("rayStartParams", "num-gpus")
        )
        yield Problem((*at, *where), f"got {claimed}, but the pod has {gpus} ({_GPU} under limits)")
    name = pod.get("nodeSelector", {}).get(_INSTANCE_LABEL)
    types = {**table("aws").types, **table("gcp").types}
    if name in types and gpus > types[name].gpus and not name.startswith("n1-"):
        yield Problem((*place, "limits", _GPU), f"got {gpus}, but a {name} has {types[name].gpus}")
    names = [volume["name"] for volume in pod.get("volumes", [])]
    for number, mount in enumerate(pod["containers"][0].get("volumeMounts", [])):
        if mount["name"] not in names:
            mounted = (*in_pod, "containers", 0, "volumeMounts", number, "name")
            yield Problem(mounted, f"got {mount['name']}, which is none of the pod's volumes")
