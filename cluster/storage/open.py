"""Open the store at an address."""

from __future__ import annotations

from pathlib import Path

from cluster.storage.local_store import LEFTOVER_SECONDS, LocalStore
from cluster.storage.manifest import check_digest
from cluster.storage.store import ArtifactStore

_CHECK_ATTEMPTS = 5
"""The check of a bucket retries each request for some three seconds: a user waits for the answer."""


def is_remote(address: str) -> bool:
    """Return whether the store at this address is not a folder."""
    return "://" in address


def open_store(address: str, downloads: Path | None = None) -> ArtifactStore:
    """Return the store at this address: a folder, or s3://BUCKET/PREFIX (its options: cluster/storage/s3_address.py).

    Opening creates nothing and sends no request. `downloads` is the folder in which a remote store keeps copies of
    artifacts, for all processes of this machine; without it each fetch is a download. ValueError for other addresses.
    """
    if not is_remote(address):
        return LocalStore(Path(address).expanduser())
    scheme = address.partition("://")[0]
    if scheme != "s3":
        raise ValueError(f"there are no {scheme}:// stores; give a folder or s3://bucket/prefix")
    # boto3 takes a third of a second to import, which users of a folder need not spend.
    from cluster.storage.s3_store import S3Store

    return S3Store(address, downloads)


def prepare_store(address: str) -> None:
    """Prepare a store for the writes of a study: create a folder, or check that a bucket can be reached.

    Unfinished writes that are a day old are removed from a folder; for a bucket `slimfront store --sweep` does that.
    """
    store = open_store(address)
    store.ensure()
    if not is_remote(address):
        store.sweep(LEFTOVER_SECONDS)


def artifact_url(address: str, digest: str) -> str:
    """Return where other tools find the files of an artifact of the store at this address: a folder, or s3://…"""
    check_digest(digest)
    if is_remote(address):
        return f"{address.partition('?')[0].rstrip('/')}/objects/{digest}/files"
    return str(Path(address) / "objects" / digest[:2] / digest)


def check_store(address: str) -> None:
    """Do once all that a study does in a bucket; create the folders of a local store.

    ValueError for an invalid address, OSError if the store can't be reached or an operation is not allowed.
    """
    if not address.startswith("s3://"):
        open_store(address).ensure()
        return
    from cluster.storage.s3_store import S3Store

    S3Store(address, attempts=_CHECK_ATTEMPTS).check()
