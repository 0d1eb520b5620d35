"""The exact versions of all packages in a cluster's image: slimfront's lock, or the versions of this machine.

Python, Ray and the packages that affect results must have the same versions on the machine that sends a study and on
the nodes. So the installed versions win wherever they differ from the lock.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_EXTRA = re.compile(r"extra == [\"']([A-Za-z0-9._-]+)[\"']")
_PIN = re.compile(r"([a-z0-9-]+)==([^\s;]+)")


def constraints(installed: Mapping[str, str], lock: str) -> str:
    """Return the contents of the constraints.txt with which pip installs the image's packages.

    It is the lock if that has every installed version: the lock also has the packages that only other platforms need,
    such as those of CUDA. Otherwise it has the installed versions alone: versions of both could contradict each other.
    """
    locked = locked_versions(lock)
    differing = [name for name, version in installed.items() if version not in locked.get(name, ())]
    if not differing:
        return lock
    lines = [
        "# The versions of the machine that ran `slimfront init`. They differ from slimfront's lock in:",
        *(f"#   {name}" for name in differing),
        *(f"{name}=={version}" for name, version in installed.items()),
    ]
    return "".join(f"{line}\n" for line in lines)


def installed_versions(distribution: str, extras: Iterable[str]) -> dict[str, str]:
    """Return the versions of all installed packages that a distribution needs, directly or indirectly, by name.

    Markers of platforms are not evaluated: a package that is installed counts. A build's suffix (+cpu) is dropped,
    because the nodes may have GPUs. Packages of an extra that are not installed are absent.
    """
    versions: dict[str, str] = {}
    visited = set()
    pending: list[tuple[str, frozenset[str]]] = [(distribution, frozenset(extras))]
    while pending:
        name, chosen_extras = pending.pop()
        if (name, chosen_extras) in visited:
            continue
        visited.add((name, chosen_extras))
        try:
            requirements = metadata.requires(name) or []
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            extra = _EXTRA.search(str(requirement.marker))
            if extra is None or extra[1] in chosen_extras:
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del versions[distribution]
    return dict(sorted(versions.items()))


def read_lock() -> str:
    """Return slimfront's lock; "" if this copy has none.

    A checkout has it in its root, the wheel in its metadata.
    """
    path = Path(__file__).parents[2] / "constraints.txt"
    if path.is_file():
        return path.read_text("utf-8")
    return metadata.distribution("slimfront").read_text("extra_metadata/constraints.txt") or ""


def locked_versions(lock: str) -> dict[str, set[str]]:
    """Return the versions that a lock has of each package: several if they depend on the platform."""
    versions: dict[str, set[str]] = defaultdict(set)
    for line in lock.splitlines():
        pin = _PIN.match(line)
        if pin is not None:
            versions[canonicalize_name(pin[1])].add(pin[2])
    return dict(versions)
