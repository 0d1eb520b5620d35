"""S3Store: a store in a bucket, for machines that share no file system."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage.artifact_cache import ArtifactCache
from cluster.storage.manifest import (
    ArtifactRef,
    DamagedError,
    Entry,
    check_digest,
    check_key,
    check_prefix,
    files_of,
    link_or_copy,
    listing,
    manifest,
)
from cluster.storage.s3 import AT_ONCE, ATTEMPTS, AbsentError, Bucket, TakenError
from cluster.storage.s3_address import parse
from cluster.storage.s3_upload import PART_BYTES, HashedFile, Upload, hash_file, send_all
from cluster.storage.store import Holdings, StoredArtifact

_MAX_KEY_BYTES = 1024
"""S3's limit of the length of a key."""


@dataclass(frozen=True)
class _ObjectGroup:
    """The objects under one digest: an artifact, or the files of an unfinished one."""

    ref: ArtifactRef
    items: list[dict[str, Any]]
    """S3's list entries of its files and its manifest."""
    used_at: float | None
    """The time of the last use; None if there is no manifest, that is no artifact."""


@dataclass(frozen=True)
class _Range:
    """A part of a file to download."""

    file: Path
    key: str
    start: int
    end: int


class S3Store:
    """A store in a bucket, or below a prefix in one.

        objects/abcd…/files/…          an artifact's files, under their own names
        objects/abcd…/manifest.json    their names, sizes and digests; its own digest is the artifact's
        records/results/0123.json      a record

    A manifest is written after all its files: it makes them an artifact. The time of its last change is that of the
    artifact's last use. Files without a manifest, and uploads in parts that were not completed, come from killed
    writers; the next writer of the same content resumes them (docs/decisions/s3.md).

    Requests raise the errors of Bucket.
    """

    def __init__(self, address: str, downloads: Path | None = None, attempts: int = ATTEMPTS) -> None:
        self.address = parse(address)
        self._bucket = Bucket(self.address, attempts)
        self._cache = None if downloads is None else ArtifactCache(downloads, self.address.cache_gb * 1e9)

    def ensure(self) -> None:
        """Check that the bucket exists and can be listed."""
        self._bucket.call("list_objects_v2", "", {"Prefix": self._key("records/"), "MaxKeys": 1})

    def check(self) -> None:
        """Do once, with an object of its own, all that a study does in the bucket. Raises the errors of requests."""
        key = self._key(f"probe/{uuid.uuid4().hex}")
        self._bucket.call("list_objects_v2", "", {"Prefix": key})
        with contextlib.suppress(TakenError):  # by an earlier attempt of this request whose answer was lost
            self._bucket.create(key, b"", {})
        try:
            self._bucket.read(key)
            with contextlib.suppress(TakenError):
                self._bucket.create(key, b"again", {})
                raise OSError(
                    f"{self.address} lets If-None-Match: * overwrite an object, so results could be counted twice; "
                    "use a service that supports it"
                )
            self._check_uploads(key)
        finally:
            self._bucket.call("delete_object", key)

    def put(self, folder: Path) -> ArtifactRef:
        """Send a folder. Files, and parts of large ones, that an earlier put of the same content sent are reused."""
        hashed = [hash_file(folder, name) for name in files_of(folder)]
        entries = [file.entry for file in hashed]
        for entry in entries:
            _check_name(entry.name)
        ref = manifest(entries)
        # Repeat until the bucket lists all files: a sweep may remove an earlier writer's files meanwhile.
        for _ in range(self._bucket.attempts + 1):
            missing = self._missing(folder, ref, hashed)
            if not missing:
                break
            send_all(self._bucket, missing)
        else:
            raise OSError(f"files of {folder} changed, or vanished from {self.address}, while they were put")
        self._bucket.put(self._object(ref, "manifest.json"), listing(entries))
        if self._cache is not None:
            self._cache.add(ref, folder, entries, _copy)
        return ref

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Create links to this machine's copy, or download. Every byte is hashed, as in LocalStore."""
        if os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists; an artifact is fetched into a new folder")
        try:
            self._touch(ref)
            if self._cache is not None and self._cache.fetch(ref, folder):
                return
            entries = self._entries(ref)
            folder.parent.mkdir(parents=True, exist_ok=True)
            staged = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
            try:
                staged.mkdir()
                self._download(ref, entries, staged)
                if self._cache is not None:
                    self._cache.add(ref, staged, entries, link_or_copy)
                staged.rename(folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        except AbsentError:
            raise LookupError(f"artifact {ref.digest} is not in {self.address}") from None

    def has(self, ref: ArtifactRef) -> bool:
        try:
            self._bucket.read(self._object(ref, "manifest.json"))
        except AbsentError:
            return False
        return True

    def remove(self, ref: ArtifactRef) -> None:
        # The manifest goes first: without it there is no artifact, wherever this is killed.
        self._bucket.call("delete_object", self._object(ref, "manifest.json"))
        for item in self._bucket.listed(self._object(ref, "")):
            self._bucket.call("delete_object", item["Key"])
        if self._cache is not None:
            self._cache.remove(ref)

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        """Create a record, marked with a random writer id.

        If the answer to a successful request is lost, the repeated request finds the key taken; the writer id in the
        record tells that this call created it.
        """
        object_key = self._record(key)
        content = json.dumps(dict(record), allow_nan=False, sort_keys=True).encode()
        writer = uuid.uuid4().hex
        try:
            self._bucket.create(object_key, content, {"writer": writer})
        except TakenError:
            return self._writer(object_key) == writer
        return True

    def record(self, key: str) -> dict[str, Any] | None:
        try:
            loaded: dict[str, Any] = json.loads(self._bucket.read(self._record(key)))
        except AbsentError:
            return None
        return loaded

    def records(self, prefix: str) -> Iterator[str]:
        top = self._key("records/")
        names = [item["Key"][len(top) :] for item in self._bucket.listed(top + check_prefix(prefix))]
        keys = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        # The bucket may contain objects of other programs.
        yield from sorted(key for key in keys if _is_key(key))

    def forget(self, key: str) -> None:
        self._bucket.call("delete_object", self._record(key))

    def holdings(self) -> Holdings:
        artifacts, unfinished = [], sum(size_bytes for _, size_bytes, _ in self._uploads())
        for group in self._object_groups():
            if group.used_at is None:
                unfinished += sum(item["Size"] for item in group.items)
            else:
                artifacts.append(StoredArtifact(group.ref, group.used_at))
        records = [item["Size"] for item in self._bucket.listed(self._key("records/"))]
        return Holdings(tuple(artifacts), len(records), sum(records), unfinished)

    def sweep(self, seconds: float) -> None:
        """Abort uploads that were not completed, and delete files without a manifest."""
        latest_change = time.time() - seconds
        for upload, _, touched_at in self._uploads():
            if touched_at <= latest_change:
                with contextlib.suppress(AbsentError):
                    upload_id = {"UploadId": upload["UploadId"]}
                    self._bucket.call("abort_multipart_upload", upload["Key"], upload_id)
        for group in self._object_groups():
            last_change = max(item["LastModified"].timestamp() for item in group.items)
            if group.used_at is None and last_change <= latest_change:
                for item in group.items:
                    self._bucket.call("delete_object", item["Key"])

    def _missing(self, folder: Path, ref: ArtifactRef, hashed: Sequence[HashedFile]) -> list[Upload]:
        """Return the files of an artifact that the bucket does not have."""
        sizes = {item["Key"]: item["Size"] for item in self._bucket.listed(self._object(ref, "files/"))}
        uploads = [
            Upload(folder / file.entry.name, self._object(ref, f"files/{file.entry.name}"), file)
            for file in hashed
        ]
        return [upload for upload in uploads if sizes.get(upload.key) != upload.hashed.entry.size_bytes]

    def _download(self, ref: ArtifactRef, entries: list[Entry], folder: Path) -> None:
        ranges = []
        for entry in entries:
            file = folder / entry.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            key = self._object(ref, f"files/{entry.name}")
            for start in range(0, entry.size_bytes, PART_BYTES):
                ranges.append(_Range(file, key, start, min(start + PART_BYTES, entry.size_bytes)))
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(partial(_download_range, self._bucket), ranges))
        except AbsentError:
            # An artifact that lacks a file is damaged: without its manifest, it can be put again.
            self._bucket.call("delete_object", self._object(ref, "manifest.json"))
            raise
        for entry in entries:
            (folder / entry.name).chmod(0o444)
        if manifest(hash_file(folder, entry.name).entry for entry in entries) != ref:
            raise self._damaged(ref)

    def _entries(self, ref: ArtifactRef) -> list[Entry]:
        """Read a manifest. OSError if it belongs to another artifact, or names files that no folder may have."""
        content = self._bucket.read(self._object(ref, "manifest.json"))
        if hashlib.sha256(content).hexdigest() != ref.digest:
            raise self._damaged(ref)
        entries = [Entry(*fields) for fields in json.loads(content)]
        try:
            for entry in entries:
                _check_name(entry.name)
        except ValueError as error:
            raise OSError(f"artifact {ref.digest} in {self.address} is not fetched: {error}") from None
        return entries

    def _damaged(self, ref: ArtifactRef) -> DamagedError:
        return DamagedError(
            f"artifact {ref.digest} in {self.address} is damaged; remove it, so that it is made again"
        )

    def _touch(self, ref: ArtifactRef) -> None:
        """Note that an artifact is used now, if that is allowed. AbsentError if the store does not have it.

        The manifest is copied onto itself: unlike a put, a copy cannot bring back an artifact that another process
        removes at this moment.
        """
        key = self._object(ref, "manifest.json")
        parameters = {
            "CopySource": {"Bucket": self.address.bucket, "Key": key},
            "MetadataDirective": "REPLACE",
            "Metadata": {"used": str(int(time.time()))},
        }
        try:
            self._bucket.call("copy_object", key, parameters)
        except PermissionError:
            self._bucket.read(key)

    def _writer(self, key: str) -> str | None:
        try:
            metadata: dict[str, str] = self._bucket.call("get_object", key)["Metadata"]
        except AbsentError:
            return None
        return metadata.get("writer")

    def _check_uploads(self, key: str) -> None:
        """Start an upload in parts, list it and abort it."""
        upload = self._bucket.call("create_multipart_upload", key)["UploadId"]
        list(self._bucket.pages("list_multipart_uploads", "", {"Prefix": key}, "Uploads"))
        self._bucket.call("abort_multipart_upload", key, {"UploadId": upload})

    def _uploads(self) -> Iterator[tuple[dict[str, Any], int, float]]:
        """Return each upload that was not completed, the size of its parts, and the time of its last part."""
        prefix = {"Prefix": self._key("objects/")}
        for upload in self._bucket.pages("list_multipart_uploads", "", prefix, "Uploads"):
            upload_id = {"UploadId": upload["UploadId"]}
            try:
                parts = list(self._bucket.pages("list_parts", upload["Key"], upload_id, "Parts"))
            except AbsentError:
                continue
            times = [upload["Initiated"], *(part["LastModified"] for part in parts)]
            yield upload, sum(part["Size"] for part in parts), max(times).timestamp()

    def _object_groups(self) -> Iterator[_ObjectGroup]:
        top = self._key("objects/")
        by_digest: dict[str, list[dict[str, Any]]] = {}
        for item in self._bucket.listed(top):
            digest = item["Key"][len(top) :].partition("/")[0]
            with contextlib.suppress(ValueError):  # an object of another program
                by_digest.setdefault(check_digest(digest), []).append(item)
        for digest, items in by_digest.items():
            files = [item for item in items if item["Key"].startswith(f"{top}{digest}/files/")]
            manifests = [item for item in items if item["Key"] == f"{top}{digest}/manifest.json"]
            used_at = manifests[0]["LastModified"].timestamp() if manifests else None
            yield _ObjectGroup(ArtifactRef(digest, sum(item["Size"] for item in files)), items, used_at)

    def _key(self, name: str) -> str:
        if not self.address.prefix:
            return name
        return f"{self.address.prefix}/{name}"

    def _object(self, ref: ArtifactRef, name: str) -> str:
        key = self._key(f"objects/{check_digest(ref.digest)}/{name}")
        if len(key.encode()) > _MAX_KEY_BYTES:
            raise ValueError(f"{name!r} is too long a name for a file in {self.address}")
        return key

    def _record(self, key: str) -> str:
        return self._key(f"records/{check_key(key)}.json")


def _download_range(bucket: Bucket, part: _Range) -> None:
    content = bucket.read(part.key, part.start, part.end)
    with part.file.open("r+b") as writer:
        writer.seek(part.start)
        writer.write(content)


def _check_name(name: str) -> None:
    """Check a file's name. ValueError if it would leave the artifact's folder, or if S3 can't list it."""
    if {"", ".", ".."} & {*name.split("/")} or not name.isprintable():
        raise ValueError(f"{name!r} is no name of a file in an artifact")


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o444)
