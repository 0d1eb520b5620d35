"""Check the addresses of a study: its name, its store and its MLflow server."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from cluster.storage.local_store import LocalStore
from cluster.storage.open import is_remote
from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.inputs import FOLDER as INPUTS
from orchestrator.persistence.study_folder import CACHE, DOWNLOADS
from orchestrator.planning.problem_list import ProblemList
from orchestrator.planning.validation import Check

MAX_NAME = 100
"""Characters of a study's name, at most: folders, Ray jobs and MLflow experiments are named after it."""
RESERVED_NAMES = frozenset({*LocalStore.FOLDERS, CACHE, DOWNLOADS, INPUTS})
"""The folders of a store itself. A study of such a name would be swept with their contents."""
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""The schemes of tracking servers and databases that MLflow 3 writes to."""
_METADATA_HOSTS = ("metadata.google.internal", "metadata", "instance-data")


def check_addresses(config: StudyConfig, problems: ProblemList) -> None:
    """Check a study's name and addresses. No message repeats a password."""
    for check in (
        *_name_checks(config.name),
        *_store_checks(config.store),
        *_tracking_checks(config.tracking.uri),
    ):
        problems.check(check.key, check.value, check.holds, check.expected)


def _name_checks(name: str) -> Iterator[Check]:
    yield Check("name", name[:MAX_NAME], len(name) <= MAX_NAME, f"at most {MAX_NAME} characters")
    is_free = name.lower() not in RESERVED_NAMES
    yield Check("name", name, is_free, "another name: the store has a folder of this name for itself")


def without_password(address: str) -> str:
    """Return a text with the passwords of its addresses replaced by `…`."""
    return re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1…@", address)


def _store_checks(store: str) -> Iterator[Check]:
    if is_remote(store):
        return
    folder = Path(store).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    is_folder = existing.is_dir()
    expected = f"a folder that this user can write: {existing}"
    yield Check("store", store, is_folder, f"{expected} is not a folder")
    if is_folder:
        can_write = os.access(existing, os.W_OK | os.X_OK)
        yield Check("store", store, can_write, f"{expected} is read-only for this user")
        on_disk = os.statvfs(existing).f_blocks > 0
        yield Check("store", store, on_disk, f"{expected} is not on a disk")


def _tracking_checks(uri: str | None) -> Iterator[Check]:
    if uri is None or uri in ("", "none"):
        return
    masked = without_password(uri)
    has_password = masked != uri
    expected = (
        "an address without a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
    )
    yield Check("tracking.uri", masked, not has_password, expected)
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    expected = f"none, or an address that begins with {', '.join(f'{name}:' for name in _SCHEMES)}"
    yield Check("tracking.uri", masked, scheme in _SCHEMES, expected)
    if scheme in ("http", "https"):
        expected = "the address of an MLflow server, not of a cloud's metadata service"
        yield Check("tracking.uri", masked, not _is_metadata_host(parts.hostname or ""), expected)


def _is_metadata_host(host: str) -> bool:
    """Whether a host is a metadata service of a cloud, which gives credentials to every request."""
    if host.lower() in _METADATA_HOSTS:
        return True
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False
