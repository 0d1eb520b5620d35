"""Checking: whether a template would start the cluster that it says. Asks no cloud and starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.templates import kuberay, launcher
from cluster.templates.placed import Document, Problem, documents, shown


@dataclass(frozen=True)
class Line:
    """What a person reads of a problem. Those that are not `certain` are warnings."""

    text: str
    certain: bool


def check(path: Path) -> list[Line]:
    """All that is wrong with a template, or may be, in the order of its lines: `file:line key: got X, expected Y`.

    Raises ValueError where it is no YAML or neither of Ray's launcher nor of KubeRay; OSError where it can't be read.
    """
    held = [document for document in documents(path) if document.data is not None]
    if not held:
        raise ValueError(
            f"{path} got nothing, expected a template: slimfront init --template aws DIR writes one"
        )
    found = []
    for document in held:
        problems = [*problems_of(path, document), *(Problem(key, "is given twice") for key in document.twice)]
        # What an alias brings to many places is told once.
        told: dict[tuple[int, str], Line] = {}
        for one in problems:
            line = document.line(one.key)
            text = f"{path}:{line} {shown(one.key) or 'file'}: {one.message}"
            told.setdefault((line, one.message), Line(text, one.certain))
        found += [line for _, line in sorted(told.items(), key=lambda entry: entry[0][0])]
    return found


def problems_of(path: Path, document: Document) -> list[Problem]:
    """All that is wrong with one document of the file `path`. Raises ValueError where it is none of a cluster's."""
    data = document.data
    if not isinstance(data, dict):
        raise ValueError(f"{path}:{document.line(())} got {type(data).__name__}, expected keys with values")
    if str(data.get("apiVersion", "")).startswith("ray.io/"):
        return kuberay.check(document)
    if "apiVersion" in data:
        said = f"got {data['apiVersion']}: only ray.io/v1 is checked"
        return [Problem(("apiVersion",), said, certain=False)]
    if not data.keys() & {"cluster_name", "provider", "available_node_types"}:
        raise ValueError(
            f"{path}:{document.line(())} got neither a file of Ray's launcher (cluster_name, provider) nor a "
            "manifest of KubeRay (apiVersion: ray.io/v1)"
        )
    return launcher.check(document)
