"""Fill in the files of a cluster from a few choices."""

from __future__ import annotations

import platform
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from cluster.templates import pins
from cluster.templates.instances import Instance, table
from cluster.templates.schema import unknown

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "aws": ("aws.yaml", "Dockerfile"),
    "gcp": ("gcp.yaml", "Dockerfile"),
    "kuberay": ("raycluster.yaml", "rayjob.yaml", "Dockerfile"),
}
"""The files of each template; constraints.txt, which the Dockerfile reads, is added."""

# The smallest machine with a GPU of each kind on which a job fits.
_GPU_TYPES = {
    "aws": {"T4": "g4dn.2xlarge", "A10G": "g5.2xlarge", "L4": "g6.2xlarge", "L40S": "g6e.2xlarge",
            "A100": "p4d.24xlarge", "H100": "p5.4xlarge"},
    "gcp": {"T4": "n1-standard-8", "L4": "g2-standard-8", "A100": "a2-highgpu-1g", "H100": "a3-highgpu-1g"},
}  # fmt: skip
_HEAD_TYPE = {"aws": "m7i.large", "gcp": "e2-standard-4"}
_CPU_TYPE = {"aws": "c7i.2xlarge", "gcp": "c3-standard-8"}
_REGION = {"aws": "us-east-1", "gcp": "us-central1"}
_EXTRAS = ("gguf", "onnx", "openvino", "tasks")
# The client with which Ray's head starts machines of Google Cloud; this version fits the pinned Ray.
_GOOGLE_API = "2.202.0"
_FORMS = {
    "name": (r"[a-z][a-z0-9-]{0,29}", "a letter and up to 29 of a-z, 0-9 and -"),
    "region": (r"[a-z]+(-[a-z]+)*-?[a-z]*\d", "a region, as in us-east-1 or us-central1"),
    "zone": (r"[a-z]+(-[a-z]+)*\d-[a-z]", "a zone, as in us-central1-a"),
    "project": (r"[a-z][a-z0-9:.-]{4,61}[a-z0-9]", "the id of a project of Google Cloud"),
    "image": (
        r"[A-Za-z0-9][A-Za-z0-9._/:@-]*",
        "the name of an image, as in registry.example.org/team/slimfront:1",
    ),
}
# The templates to which a choice applies, if not to all.
_ONLY = {"region": ("aws", "gcp"), "zone": ("gcp",), "project": ("gcp",), "gpu": ("aws", "gcp")}


@dataclass(frozen=True)
class Choices:
    """The choices for a cluster; None stands for the default, if there is one."""

    name: str = "slimfront"
    image: str | None = None
    """The address from which nodes pull the image that the Dockerfile makes."""
    max_workers: int = 4
    """The largest number of nodes besides the head."""
    region: str | None = None
    zone: str | None = None
    project: str | None = None
    """The project of Google Cloud."""
    gpu: str | None = None
    """The kind of GPU, as L4."""


def fill(template: str, choices: Choices) -> dict[str, str]:
    """Return the files' contents by name. ValueError lists all choices that do not fit, a line each."""
    if template not in TEMPLATES:
        raise ValueError(f"template: {unknown(template, TEMPLATES)}")
    messages = refusals(template, choices)
    if messages:
        raise ValueError("\n".join(messages))
    values = _versions() | _values(template, choices)
    contents = {name: _filled(name, values) for name in TEMPLATES[template]}
    installed = pins.installed_versions("slimfront", _EXTRAS)
    return contents | {"constraints.txt": pins.constraints(installed, pins.read_lock())}


def refusals(template: str, choices: Choices) -> list[str]:
    """Return the problems of the choices, a line each."""
    messages = []
    for field in fields(choices):
        value = getattr(choices, field.name)
        if value is None:
            continue
        if template not in _ONLY.get(field.name, TEMPLATES):
            messages.append(f"{field.name}: got {value}, which does not apply to {template}")
        elif field.name in _FORMS and not re.fullmatch(_FORMS[field.name][0], str(value)):
            messages.append(f"{field.name}: got {value}, expected {_FORMS[field.name][1]}")
    if choices.max_workers < 1:
        messages.append(f"max_workers: got {choices.max_workers}, expected 1 or more")
    kinds = _GPU_TYPES.get(template, {})
    if choices.gpu is not None and kinds and choices.gpu not in kinds:
        messages.append(f"gpu: {unknown(choices.gpu, kinds)}")
    if template == "gcp" and choices.project is None:
        messages.append("project: got nothing, expected the id of a project of Google Cloud")
    region = choices.region or _REGION.get(template, "")
    if choices.zone is not None and template == "gcp" and not choices.zone.startswith(f"{region}-"):
        messages.append(f"zone: got {choices.zone}, expected a zone of {region}")
    return messages


def write(contents: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files into the folder, which is created. FileExistsError, before any is written, if one exists."""
    paths = [folder / name for name in contents]
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise FileExistsError(
            f"{', '.join(existing)} would be overwritten; name another folder, or move them away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, contents.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "ray": metadata.version("ray"),
        "slimfront": metadata.version("slimfront"),
        "google_api": _GOOGLE_API,
        "extras": ",".join(_EXTRAS),
    }


def _values(template: str, choices: Choices) -> dict[str, str]:
    version = metadata.version("slimfront")
    values = {
        "name": choices.name,
        "image": choices.image or f"slimfront:{version}",
        "max_workers": str(choices.max_workers),
        "cloud_packages": f" google-api-python-client=={_GOOGLE_API}" if template == "gcp" else "",
    }
    if template == "kuberay":
        return values
    region = choices.region or _REGION[template]
    gpu = choices.gpu or "L4"
    types = table(template).types
    gpu_type, cpu_type = _GPU_TYPES[template][gpu], _CPU_TYPE[template]
    is_attached = gpu_type.startswith("n1-")  # GPUs of n1 machines are attached separately
    zone = choices.zone or f"{region}-a"
    cores = types[cpu_type].cpus // 2
    return values | {
        "region": region,
        "zone": zone,
        "project": choices.project or "",
        "head_type": _HEAD_TYPE[template],
        "gpu": gpu,
        "gpu_type": gpu_type,
        "gpu_cpus": str(types[gpu_type].cpus),
        "gpus": str(1 if is_attached else types[gpu_type].gpus),
        "accelerators": _accelerators(choices.project or "", zone, gpu) if is_attached else "",
        "gpu_memory": str(_task_memory(types[gpu_type])),
        "cpu_type": cpu_type,
        "cpu_memory": str(_task_memory(types[cpu_type])),
        "cpu_cpus": str(cores),
        "cpu_cores": str(cores),
    }


def _task_memory(instance: Instance) -> int:
    """Return the bytes of memory for tasks: the system has a tenth, and Ray's object store 30 % of the remainder."""
    return int(instance.memory_gib * 2**30 * 0.9 * 0.7)


def _accelerators(project: str, zone: str, gpu: str) -> str:
    kind = f"projects/{project}/zones/{zone}/acceleratorTypes/nvidia-tesla-{gpu.lower()}"
    return f"\n      guestAccelerators:\n        - {{acceleratorType: {kind}, acceleratorCount: 1}}"


def _filled(name: str, values: Mapping[str, str]) -> str:
    text = (files("cluster.templates") / "shipped" / name).read_text("utf-8")
    indent = re.search(r"^( *)\$\{spec\}", text, re.MULTILINE)
    if indent is not None:
        # The cluster is the same in both manifests, at another depth.
        spec = (files("cluster.templates") / "shipped" / "rayclusterspec.yaml").read_text("utf-8")
        lines = [f"{indent[1]}{line}" if line else "" for line in spec.rstrip("\n").split("\n")]
        text = text.replace(f"{indent[1]}${{spec}}", "\n".join(lines))
    return string.Template(text).substitute(values)
