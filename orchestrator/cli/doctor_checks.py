"""Diagnosis: what this machine can do for slimfront, and the cure for what it can't."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from cluster import doctor
from jobs import formats, meters, runtimes
from jobs import techniques as known


@dataclass(frozen=True)
class Finding:
    what: str
    value: str
    ok: bool
    hint: str = ""


_NEEDED = ("torch", "transformers", "deepspeed", "ray", "mlflow", "optuna", "omegaconf", "boto3")
_OPTIONAL = {"gguf": "pip install 'slimfront[gguf]' to read models shipped as GGUF"}


def diagnose() -> list[Finding]:
    """Libraries, machine, and what each room has to offer."""
    findings = [_library(name) for name in _NEEDED]
    for name, hint in _OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        findings.append(
            Finding(name, version(name) if there else "not installed", True, "" if there else hint)
        )
    findings += [Finding(*fact) for fact in doctor.facts()]
    findings.append(Finding("techniques", ", ".join(known.names()), bool(known.names())))
    findings.append(Finding("meters", ", ".join(meters.names()), bool(meters.names())))
    for what, known_ones in (("runtime", runtimes), ("format", formats)):
        for name in known_ones.names():
            lacking = known_ones.load(name).missing()
            value = "usable" if lacking is None else "not here"
            findings.append(Finding(f"{what} {name}", value, True, lacking or ""))
    return findings


def _library(name: str) -> Finding:
    try:
        return Finding(name, version(name), True)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, f"pip install {name}")
