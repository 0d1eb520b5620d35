"""Open the store that an address names."""

from __future__ import annotations

from pathlib import Path

from cluster.storage.local_store import LocalStore
from cluster.storage.manifest import check_digest
from cluster.storage.store import ArtifactStore

_TRIALS = 5
"""A store that is reached for the first time is given some three seconds to do better."""


def is_remote(address: str) -> bool:
    """Whether a store of this address lies elsewhere than in a folder."""
    return "://" in address


def open_store(address: str, downloads: Path | None = None) -> ArtifactStore:
    """The store at this address: a folder, or s3://BUCKET/PREFIX (cluster/storage/s3.py tells its options).

    downloads: the folder in which a remote store keeps copies of artifacts, for all processes of this machine;
    without it each fetch is a download. ValueError for other addresses; a remote store is not asked yet.
    """
    if not is_remote(address):
        return LocalStore(Path(address).expanduser())
    scheme = address.partition("://")[0]
    if scheme != "s3":
        raise ValueError(f"there are no {scheme}:// stores; give a folder or s3://bucket/prefix")
    # boto3 takes a third of a second to import, which nobody pays who has a folder.
    from cluster.storage.s3_store import S3Store

    return S3Store(address, downloads)


def artifact_url(address: str, digest: str) -> str:
    """Where the files of an artifact lie in the store at this address, for other tools to read: a folder, or s3://…"""
    check_digest(digest)
    if is_remote(address):
        return f"{address.partition('?')[0].rstrip('/')}/objects/{digest}/files"
    return str(Path(address) / "objects" / digest[:2] / digest)


def check_store(address: str) -> None:
    """Do once in a remote store what a study does there. ValueError for an address that is none, OSError where the
    store can't be reached or something is not allowed."""
    if not address.startswith("s3://"):
        open_store(address)
        return
    from cluster.storage.s3_store import S3Store

    S3Store(address, attempts=_TRIALS).check()
