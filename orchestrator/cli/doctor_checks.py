"""Check the libraries and the machine for `slimfront doctor`."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from cluster import doctor
from cluster.doctor import Fact
from jobs import formats, meters, runtimes, techniques

_REQUIRED = ("torch", "transformers", "deepspeed", "ray", "mlflow", "optuna", "omegaconf", "boto3")
_OPTIONAL = {"gguf": "pip install 'slimfront[gguf]' to read models in the GGUF format"}


def diagnose() -> list[Fact]:
    """Check libraries, machine, techniques, meters, runtimes and formats."""
    facts = [_required(name) for name in _REQUIRED]
    facts += [_optional(name, hint) for name, hint in _OPTIONAL.items()]
    facts += doctor.facts()
    for kind, names in (("techniques", techniques.names()), ("meters", meters.names())):
        facts.append(Fact(kind, ", ".join(names), bool(names)))
    facts += [_usable(f"runtime {name}", runtimes.load(name).missing()) for name in runtimes.names()]
    facts += [_usable(f"format {name}", formats.load(name).missing()) for name in formats.names()]
    return facts


def _required(name: str) -> Fact:
    try:
        return Fact(name, version(name))
    except PackageNotFoundError:
        return Fact(name, "not installed", False, f"pip install {name}")


def _optional(name: str, hint: str) -> Fact:
    if importlib.util.find_spec(name) is None:
        return Fact(name, "not installed", True, hint)
    return Fact(name, version(name))


def _usable(name: str, reason: str | None) -> Fact:
    """reason: why it cannot be used on this machine; None if it can."""
    if reason is None:
        return Fact(name, "usable")
    return Fact(name, "not usable", True, reason)
