"""Upload: send the files of an artifact to a bucket, large ones in parts, and resume interrupted uploads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage.manifest import Entry
from cluster.storage.s3 import AT_ONCE, AbsentError, Bucket, encoded

PART_BYTES = 16 * 2**20
"""The size of the parts in which files are sent and fetched; larger if a file would have more than 10,000."""
_MAX_PARTS = 10_000
"""S3's limit of the number of parts."""
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class HashedFile:
    """A file's description, with the SHA-256 of each of its parts."""

    entry: Entry
    parts: tuple[bytes, ...]


@dataclass(frozen=True)
class Upload:
    """A file to send, and its key in the bucket."""

    file: Path
    key: str
    hashed: HashedFile


def part_size(size_bytes: int) -> int:
    """Return the size of all parts but the last of a file of this size."""
    chunks = -(-size_bytes // (_MAX_PARTS * _CHUNK_BYTES))
    return max(PART_BYTES, chunks * _CHUNK_BYTES)


def hash_file(folder: Path, name: str) -> HashedFile:
    """Hash a file and its parts in one pass: by the parts' digests S3 refuses a file that changes before it is sent."""
    whole, parts, size_bytes = hashlib.sha256(), [], 0
    with (folder / name).open("rb") as file, ThreadPoolExecutor(1) as second_thread:
        per_part = part_size(os.fstat(file.fileno()).st_size)
        while content := file.read(per_part):
            part = second_thread.submit(hashlib.sha256, content)
            whole.update(content)
            parts.append(part.result().digest())
            size_bytes += len(content)
    return HashedFile(Entry(name, size_bytes, whole.hexdigest()), tuple(parts))


def send_all(bucket: Bucket, uploads: Sequence[Upload]) -> None:
    """Send these files: small ones at the same time, then the large ones, the parts of each at the same time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        small = [upload for upload in uploads if len(upload.hashed.parts) <= 1]
        list(pool.map(partial(_send, bucket), small))
        for upload in uploads:
            if len(upload.hashed.parts) > 1:
                _send_in_parts(bucket, pool, upload)


def _send(bucket: Bucket, upload: Upload) -> None:
    bucket.put(upload.key, upload.file.read_bytes(), bytes.fromhex(upload.hashed.entry.sha256))


def _send_in_parts(bucket: Bucket, pool: ThreadPoolExecutor, upload: Upload) -> None:
    """Send a file in parts. Processes that send the same file share one upload, and one of them completes it."""
    for _ in range(bucket.attempts):
        upload_id, sent = _started(bucket, upload.key)
        send_part = partial(_send_part, bucket, upload, upload_id, sent)
        try:
            parts = list(pool.map(send_part, range(1, len(upload.hashed.parts) + 1)))
            parameters = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
            bucket.call("complete_multipart_upload", upload.key, parameters)
            return
        except AbsentError:  # the upload has ended: another process completed it, or it was swept
            if any(item["Key"] == upload.key for item in bucket.listed(upload.key)):
                return
    raise OSError(f"the upload of {upload.key} to {bucket.address} was aborted {bucket.attempts} times")


def _started(bucket: Bucket, key: str) -> tuple[str, dict[int, dict[str, Any]]]:
    """Return the id of the key's upload in progress, or of a new one, and the parts that were sent, by number."""
    uploads = bucket.pages("list_multipart_uploads", "", {"Prefix": key}, "Uploads")
    ids = [upload["UploadId"] for upload in uploads if upload["Key"] == key]
    if not ids:
        parameters = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"}
        return bucket.call("create_multipart_upload", key, parameters)["UploadId"], {}
    try:
        parts = list(bucket.pages("list_parts", key, {"UploadId": ids[-1]}, "Parts"))
    except AbsentError:  # completed or swept meanwhile, as the first part will show
        parts = []
    return ids[-1], {part["PartNumber"]: part for part in parts}


def _send_part(
    bucket: Bucket, upload: Upload, upload_id: str, sent: Mapping[int, dict[str, Any]], number: int
) -> dict[str, Any]:
    """Send one part, unless it was sent before; return its entry in the request that completes the upload."""
    size_bytes = part_size(upload.hashed.entry.size_bytes)
    with upload.file.open("rb") as reader:
        reader.seek((number - 1) * size_bytes)
        body = reader.read(size_bytes)
    checksum = encoded(upload.hashed.parts[number - 1])
    part = sent.get(number)
    if part is None or not _is_same(part, body, checksum):
        parameters = {
            "UploadId": upload_id,
            "PartNumber": number,
            "Body": body,
            "ChecksumSHA256": checksum,
        }
        part = bucket.call("upload_part", upload.key, parameters)
    return {"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum}


def _is_same(part: Mapping[str, Any], body: bytes, checksum: str) -> bool:
    """Return whether S3's part has this content: by its SHA-256, or by its MD5 if the service lists no SHA-256."""
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return bool(part["Size"] == len(body) and part["ETag"].strip('"') == md5)
