"""Put a study's front and report into a remote store, and read them on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.storage.open import is_remote, open_store

_FRONTS, _REPORTS = "fronts", "reports"
"""Prefixes of record keys."""


def publish(store: str, study: str, front: Mapping[str, Any], page: str) -> None:
    """Replace the published front and the published report, an HTML page. Does nothing for a store on this machine."""
    if not is_remote(store):
        return
    opened = open_store(store)
    records: dict[str, Mapping[str, Any]] = {_REPORTS: {"html": page}, _FRONTS: front}
    for prefix, record in records.items():
        opened.forget(f"{prefix}/{study}")
        opened.commit(f"{prefix}/{study}", record)


def published(address: str) -> dict[str, Any]:
    """The published front of the study at STORE/NAME. LookupError if there is none."""
    return _published(address, _FRONTS, "front")


def published_report(address: str) -> str:
    """The published report of the study at STORE/NAME. LookupError if there is none."""
    return str(_published(address, _REPORTS, "report")["html"])


def _published(address: str, prefix: str, content: str) -> dict[str, Any]:
    path, mark, options = address.partition("?")
    store, _, study = path.rpartition("/")
    record = open_store(store + mark + options).record(f"{prefix}/{study}")
    if record is None:
        raise LookupError(f"{store} holds no {content} of {study}: it is put there when a search ends")
    return record
