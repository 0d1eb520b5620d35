"""Check whether a template would start the cluster that it describes. Sends no request and starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.templates import kuberay, launcher
from cluster.templates.yaml_lines import Document, Problem, documents, notation


@dataclass(frozen=True)
class Line:
    """A problem as the command prints it."""

    text: str
    certain: bool
    """False for a warning."""


def check(path: Path) -> list[Line]:
    """Return all problems of a template in the order of its lines, as `file:line key: got X, expected Y`.

    ValueError if it is no YAML, or neither a file of Ray's launcher nor of KubeRay; OSError if it can't be read.
    """
    read = [document for document in documents(path) if document.data is not None]
    if not read:
        raise ValueError(
            f"{path} got nothing, expected a template: slimfront init --template aws DIR writes one"
        )
    lines: list[Line] = []
    for document in read:
        lines += _check_document(path, document)
    return lines


def problems_of(path: Path, document: Document) -> list[Problem]:
    """Return all problems of one document of the file `path`. ValueError if it does not describe a cluster."""
    data = document.data
    if not isinstance(data, dict):
        raise ValueError(f"{path}:{document.line(())} got {type(data).__name__}, expected keys with values")
    if str(data.get("apiVersion", "")).startswith("ray.io/"):
        return kuberay.check(document)
    if "apiVersion" in data:
        message = f"got {data['apiVersion']}: only ray.io/v1 is checked"
        return [Problem(("apiVersion",), message, certain=False)]
    if not data.keys() & {"cluster_name", "provider", "available_node_types"}:
        raise ValueError(
            f"{path}:{document.line(())} got neither a file of Ray's launcher (cluster_name, provider) nor a "
            "manifest of KubeRay (apiVersion: ray.io/v1)"
        )
    return launcher.check(document)


def _check_document(path: Path, document: Document) -> list[Line]:
    problems = [*problems_of(path, document), *(Problem(key, "is given twice") for key in document.twice)]
    # A problem that an alias copies to many keys is reported once.
    by_line: dict[tuple[int, str], Line] = {}
    for problem in problems:
        line = document.line(problem.key)
        text = f"{path}:{line} {notation(problem.key) or 'file'}: {problem.message}"
        by_line.setdefault((line, problem.message), Line(text, problem.certain))
    return [line for _, line in sorted(by_line.items(), key=lambda entry: entry[0][0])]
