"""S3Store: a store in a bucket, for machines that share nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage.local_store import LocalStore
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
from cluster.storage.s3 import AT_ONCE, ATTEMPTS, AbsentError, Bucket, TakenError, encoded, parse
from cluster.storage.store import Holdings, StoredArtifact

PART_BYTES = 16 * 2**20
"""Files are sent and fetched in parts of this size, or sent in larger ones where S3's 10,000 would not do."""
_MOST_PARTS = 10_000
_CHUNK_BYTES = 2**20
_MOST_KEY_BYTES = 1024


class S3Store:
    """A store in a bucket, or below a prefix in one.

        objects/abcd…/files/…          an artifact's files, under their own names
        objects/abcd…/manifest.json    their names, sizes and digests; its own digest is the artifact's
        records/results/0123.json      a record

    A manifest is written when all its files are there: it makes them an artifact. The time of its last change is that
    of the artifact's last use. Files that no manifest names, and uploads in parts that were not completed, are what a
    killed writer left; the next one of the same content goes on from there. docs/decisions/s3.md says why it is so.

    Requests fail as those of Bucket do, after so many attempts.
    """

    def __init__(self, address: str, downloads: Path | None = None, attempts: int = ATTEMPTS) -> None:
        self.address = parse(address)
        self._bucket = Bucket(self.address, attempts)
        self._cache = None if downloads is None else LocalStore(downloads)

    def check(self) -> None:
        """Do once, with an object of its own, all that a study needs to do in the bucket. Raises as requests do."""
        key = self._key(f"probe/{uuid.uuid4().hex}")
        self._bucket.call("list_objects_v2", "", {"Prefix": key})
        with contextlib.suppress(TakenError):  # by ourselves, in a request that was taken for lost
            self._bucket.create(key, b"", {})
        try:
            self._bucket.read(key)
            with contextlib.suppress(TakenError):
                self._bucket.create(key, b"again", {})
                raise OSError(
                    f"{self.address} lets If-None-Match: * overwrite an object, so results could be counted twice; "
                    "use a service that heeds it"
                )
            self._sweepable(key)
        finally:
            self._bucket.call("delete_object", key)

    def put(self, folder: Path) -> ArtifactRef:
        """Files, and parts of large ones, that an earlier put of the same content sent are not sent again."""
        hashed = [_hashed(folder, name) for name in files_of(folder)]
        entries = [one.entry for one in hashed]
        for entry in entries:
            _check_name(entry.name)
        ref = manifest(entries)
        # Until all are seen there: what an earlier writer left may be swept while more is sent.
        for _ in range(self._bucket.attempts + 1):
            missing = self._missing(folder, ref, hashed)
            if not missing:
                break
            self._send_all(missing)
        else:
            raise OSError(f"files of {folder} changed, or vanished from {self.address}, while they were put")
        self._bucket.put(self._object(ref, "manifest.json"), listing(entries))
        self._keep(ref, folder, entries, _copy)
        return ref

    def fetch(self, ref: ArtifactRef, folder: Path) -> None:
        """Lays out links to this machine's copy where it has one, and else downloads. Every byte is hashed, as
        LocalStore does it."""
        if os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists; an artifact is fetched into a new folder")
        try:
            self._touch(ref)
            if self._fetch_copy(ref, folder):
                return
            entries = self._entries(ref)
            folder.parent.mkdir(parents=True, exist_ok=True)
            staged = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
            try:
                staged.mkdir()
                self._download(ref, entries, staged)
                self._keep(ref, staged, entries, link_or_copy)
                staged.rename(folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        except AbsentError:
            raise LookupError(f"artifact {ref.digest} is not held in {self.address}") from None

    def has(self, ref: ArtifactRef) -> bool:
        try:
            self._bucket.read(self._object(ref, "manifest.json"))
        except AbsentError:
            return False
        return True

    def remove(self, ref: ArtifactRef) -> None:
        # Without its manifest it is no artifact any more, wherever this is killed.
        self._bucket.call("delete_object", self._object(ref, "manifest.json"))
        for item in self._bucket.listed(self._object(ref, "")):
            self._bucket.call("delete_object", item["Key"])
        if self._cache is not None:
            self._cache.remove(ref)

    def commit(self, key: str, record: Mapping[str, Any]) -> bool:
        """Where a request that did create the record was taken for lost and made again, the second one finds the key
        taken; the writer's mark on the record tells that it was this one."""
        place = self._record(key)
        content = json.dumps(dict(record), allow_nan=False, sort_keys=True).encode()
        writer = uuid.uuid4().hex
        try:
            self._bucket.create(place, content, {"writer": writer})
        except TakenError:
            return self._writer(place) == writer
        return True

    def record(self, key: str) -> dict[str, Any] | None:
        try:
            loaded: dict[str, Any] = json.loads(self._bucket.read(self._record(key)))
        except AbsentError:
            return None
        return loaded

    def records(self, prefix: str) -> Iterator[str]:
        top = self._key("records/")
        found = (item["Key"][len(top) :] for item in self._bucket.listed(top + check_prefix(prefix)))
        keys = (name.removesuffix(".json") for name in found if name.endswith(".json"))
        # Others may put into a bucket what is no record of ours.
        yield from sorted(key for key in keys if _is_key(key))

    def forget(self, key: str) -> None:
        self._bucket.call("delete_object", self._record(key))

    def holdings(self) -> Holdings:
        artifacts, unfinished = [], sum(size_bytes for _, size_bytes, _ in self._uploads())
        for ref, items, used_at in self._objects():
            if used_at is None:
                unfinished += sum(item["Size"] for item in items)
            else:
                artifacts.append(StoredArtifact(ref, used_at))
        records = [item["Size"] for item in self._bucket.listed(self._key("records/"))]
        return Holdings(tuple(artifacts), len(records), sum(records), unfinished)

    def sweep(self, seconds: float) -> None:
        """Abort uploads that were not completed, and delete files that no manifest names."""
        before = time.time() - seconds
        for upload, _, touched_at in self._uploads():
            if touched_at <= before:
                with contextlib.suppress(AbsentError):
                    self._bucket.call(
                        "abort_multipart_upload", upload["Key"], {"UploadId": upload["UploadId"]}
                    )
        for _, items, used_at in self._objects():
            if used_at is None and max(item["LastModified"].timestamp() for item in items) <= before:
                for item in items:
                    self._bucket.call("delete_object", item["Key"])

    def _missing(
        self, folder: Path, ref: ArtifactRef, hashed: Sequence[_Hashed]
    ) -> list[tuple[Path, str, _Hashed]]:
        """The files of an artifact that are not there, with their keys."""
        there = {item["Key"]: item["Size"] for item in self._bucket.listed(self._object(ref, "files/"))}
        return [
            (folder / one.entry.name, key, one)
            for one in hashed
            if there.get(key := self._object(ref, f"files/{one.entry.name}")) != one.entry.size_bytes
        ]

    def _send_all(self, missing: Sequence[tuple[Path, str, _Hashed]]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            small = [one for one in missing if len(one[2].parts) <= 1]
            list(pool.map(lambda one: self._send(*one), small))
            for file, key, one in missing:
                if len(one.parts) > 1:
                    self._send_in_parts(pool, file, key, one)

    def _send(self, file: Path, key: str, hashed: _Hashed) -> None:
        self._bucket.put(key, file.read_bytes(), bytes.fromhex(hashed.entry.sha256))

    def _send_in_parts(self, pool: ThreadPoolExecutor, file: Path, key: str, hashed: _Hashed) -> None:
        """Others may send the same at the same time: they take up the same upload, and one of them completes it."""
        for _ in range(self._bucket.attempts):
            upload, sent = self._begun(key)
            part = partial(self._part, file, key, upload, sent, hashed)
            try:
                parts = list(pool.map(part, range(1, len(hashed.parts) + 1)))
                self._bucket.call(
                    "complete_multipart_upload",
                    key,
                    {"UploadId": upload, "MultipartUpload": {"Parts": parts}},
                )
                return
            except AbsentError:  # the upload has ended: completed by another, or swept
                if any(item["Key"] == key for item in self._bucket.listed(key)):
                    return
        raise OSError(f"the upload of {key} to {self.address} was aborted {self._bucket.attempts} times")

    def _begun(self, key: str) -> tuple[str, dict[int, dict[str, Any]]]:
        """The upload in parts that is under way for this key, a new one if there is none, and the parts it has."""
        uploads = self._bucket.pages("list_multipart_uploads", "", {"Prefix": key}, "Uploads")
        begun = [upload["UploadId"] for upload in uploads if upload["Key"] == key]
        if not begun:
            given = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"}
            return self._bucket.call("create_multipart_upload", key, given)["UploadId"], {}
        try:
            parts = list(self._bucket.pages("list_parts", key, {"UploadId": begun[-1]}, "Parts"))
        except AbsentError:  # completed or swept meanwhile, as the first part will tell
            parts = []
        return begun[-1], {part["PartNumber"]: part for part in parts}

    def _part(
        self,
        file: Path,
        key: str,
        upload: str,
        sent: Mapping[int, dict[str, Any]],
        hashed: _Hashed,
        number: int,
    ) -> dict[str, Any]:
        """Send one part, unless it is there already; what completing the upload has to say of it."""
        size_bytes = part_size(hashed.entry.size_bytes)
        with file.open("rb") as reader:
            reader.seek((number - 1) * size_bytes)
            body = reader.read(size_bytes)
        checksum = encoded(hashed.parts[number - 1])
        found = sent.get(number)
        if found is None or not _same(found, body, checksum):
            given = {"UploadId": upload, "PartNumber": number, "Body": body, "ChecksumSHA256": checksum}
            found = self._bucket.call("upload_part", key, given)
        return {"PartNumber": number, "ETag": found["ETag"], "ChecksumSHA256": checksum}

    def _download(self, ref: ArtifactRef, entries: list[Entry], folder: Path) -> None:
        pieces = [
            (folder / entry.name, self._object(ref, f"files/{entry.name}"), start, entry.size_bytes)
            for entry in entries
            for start in range(0, entry.size_bytes, PART_BYTES)
        ]
        for entry in entries:
            (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry.name).touch()
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda piece: self._download_piece(*piece), pieces))
        except AbsentError:
            # What lacks a file is no artifact: without its manifest, it can be put again.
            self._bucket.call("delete_object", self._object(ref, "manifest.json"))
            raise
        for entry in entries:
            (folder / entry.name).chmod(0o444)
        if manifest(_hashed(folder, entry.name).entry for entry in entries) != ref:
            raise self._damaged(ref)

    def _download_piece(self, file: Path, key: str, start: int, size_bytes: int) -> None:
        content = self._bucket.read(key, start, min(start + PART_BYTES, size_bytes))
        with file.open("r+b") as writer:
            writer.seek(start)
            writer.write(content)

    def _fetch_copy(self, ref: ArtifactRef, folder: Path) -> bool:
        """Lay out this machine's copy; False where it has none that is whole."""
        if self._cache is None:
            return False
        try:
            self._cache.fetch(ref, folder)
        except LookupError:
            return False
        except OSError:  # damaged; a disk that is full the download will meet again
            self._cache.remove(ref)
            return False
        return True

    def _keep(
        self, ref: ArtifactRef, folder: Path, entries: Sequence[Entry], take: Callable[[Path, Path], None]
    ) -> None:
        """Keep a copy on this machine, and let go of those that were used longest ago where they are too many. Where
        that is not possible all goes on."""
        if self._cache is None:
            return

        def write(held: Path) -> None:
            for entry in entries:
                take(folder / entry.name, held / entry.name)

        with contextlib.suppress(OSError):
            self._cache.lay(ref, write)
            held = sorted(self._cache.holdings().artifacts, key=lambda one: one.used_at)
            excess = sum(one.ref.size_bytes for one in held) - self.address.cache_gb * 1e9
            for one in held:
                if excess <= 0:
                    break
                self._cache.remove(one.ref)
                excess -= one.ref.size_bytes

    def _entries(self, ref: ArtifactRef) -> list[Entry]:
        """What the manifest says. OSError where it is not this artifact's, or names what no folder may hold."""
        content = self._bucket.read(self._object(ref, "manifest.json"))
        if hashlib.sha256(content).hexdigest() != ref.digest:
            raise self._damaged(ref)
        entries = [Entry(*one) for one in json.loads(content)]
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
        """Note that an artifact is used now, where that may be noted. Absent if it isn't held: a copy can't bring back
        what another removes at this moment, as a put could."""
        key = self._object(ref, "manifest.json")
        given = {
            "CopySource": {"Bucket": self.address.bucket, "Key": key},
            "MetadataDirective": "REPLACE",
            "Metadata": {"used": str(int(time.time()))},
        }
        try:
            self._bucket.call("copy_object", key, given)
        except PermissionError:
            self._bucket.read(key)

    def _writer(self, key: str) -> str | None:
        try:
            metadata: dict[str, str] = self._bucket.call("get_object", key)["Metadata"]
        except AbsentError:
            return None
        return metadata.get("writer")

    def _sweepable(self, key: str) -> None:
        """Begin an upload in parts and abort it."""
        upload = self._bucket.call("create_multipart_upload", key)["UploadId"]
        list(self._bucket.pages("list_multipart_uploads", "", {"Prefix": key}, "Uploads"))
        self._bucket.call("abort_multipart_upload", key, {"UploadId": upload})

    def _uploads(self) -> Iterator[tuple[dict[str, Any], int, float]]:
        """Uploads in parts that were not completed, how much of each is there, and when it was last touched."""
        given = {"Prefix": self._key("objects/")}
        for upload in self._bucket.pages("list_multipart_uploads", "", given, "Uploads"):
            try:
                parts = list(
                    self._bucket.pages("list_parts", upload["Key"], {"UploadId": upload["UploadId"]}, "Parts")
                )
            except AbsentError:
                continue
            touched = [upload["Initiated"], *(part["LastModified"] for part in parts)]
            yield upload, sum(part["Size"] for part in parts), max(touched).timestamp()

    def _objects(self) -> Iterator[tuple[ArtifactRef, list[dict[str, Any]], float | None]]:
        """What lies under each digest: its files, and when it was last used, None where no manifest names them."""
        top = self._key("objects/")
        found: dict[str, list[dict[str, Any]]] = {}
        for item in self._bucket.listed(top):
            digest = item["Key"][len(top) :].partition("/")[0]
            with contextlib.suppress(ValueError):  # what others put into the bucket
                found.setdefault(check_digest(digest), []).append(item)
        for digest, items in found.items():
            files = [item for item in items if item["Key"].startswith(f"{top}{digest}/files/")]
            manifests = [item for item in items if item["Key"] == f"{top}{digest}/manifest.json"]
            used_at = manifests[0]["LastModified"].timestamp() if manifests else None
            yield ArtifactRef(digest, sum(item["Size"] for item in files)), items, used_at

    def _key(self, name: str) -> str:
        return f"{self.address.prefix}/{name}" if self.address.prefix else name

    def _object(self, ref: ArtifactRef, name: str) -> str:
        key = self._key(f"objects/{check_digest(ref.digest)}/{name}")
        if len(key.encode()) > _MOST_KEY_BYTES:
            raise ValueError(f"{name!r} is too long a name for a file in {self.address}")
        return key

    def _record(self, key: str) -> str:
        return self._key(f"records/{check_key(key)}.json")


@dataclass(frozen=True)
class _Hashed:
    """A file with the SHA-256 of all of it, and of each of its parts."""

    entry: Entry
    parts: tuple[bytes, ...]


def part_size(size_bytes: int) -> int:
    """The size of all parts but the last of a file of this size."""
    chunks = -(-size_bytes // (_MOST_PARTS * _CHUNK_BYTES))
    return max(PART_BYTES, chunks * _CHUNK_BYTES)


def _hashed(folder: Path, name: str) -> _Hashed:
    """What S3 is told of each part is from the same reading as the whole's: S3 refuses a file that changed since."""
    whole, parts, size_bytes = hashlib.sha256(), [], 0
    with (folder / name).open("rb") as file, ThreadPoolExecutor(1) as beside:
        per_part = part_size(os.fstat(file.fileno()).st_size)
        while content := file.read(per_part):
            part = beside.submit(hashlib.sha256, content)
            whole.update(content)
            parts.append(part.result().digest())
            size_bytes += len(content)
    return _Hashed(Entry(name, size_bytes, whole.hexdigest()), tuple(parts))


def _same(found: Mapping[str, Any], body: bytes, checksum: str) -> bool:
    """Whether a part that S3 lists is this one: by its SHA-256, or its MD5 where a service does not tell the other."""
    if "ChecksumSHA256" in found:
        return bool(found["ChecksumSHA256"] == checksum)
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return bool(found["Size"] == len(body) and found["ETag"].strip('"') == md5)


def _check_name(name: str) -> None:
    """ValueError for a name that would leave the artifact's folder, or that S3 can't list."""
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
