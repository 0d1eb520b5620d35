"""Bucket: requests to S3, with retries and one-line errors. The only user of boto3 for storage."""

from __future__ import annotations

import base64
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import boto3
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cluster.storage.s3_address import Address

T = TypeVar("T")

AT_ONCE = 4
"""The number of simultaneous requests."""
ATTEMPTS = 12
"""The attempts of each request, some 45 s in all: if 30 % of them fail, one request of two million is given up."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 20.0

_PERMISSIONS = {
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
    "get_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "copy_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
}
"""The permission that each operation needs."""
_NEXT_PAGE = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
    "list_parts": {"PartNumberMarker": "NextPartNumberMarker"},
}
"""The parameters of the next page, with the fields of a page that have their values."""
_INVALID_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
}
_TRANSIENT = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted",
              "ConditionalRequestConflict", "InternalError", "ServiceUnavailable"}  # fmt: skip


class AbsentError(LookupError):
    """The object does not exist, or the upload has ended."""


class TakenError(FileExistsError):
    """An object with this key exists already."""


class Bucket:
    """Requests to one bucket. A request that may succeed later is retried, with growing random pauses.

    After `attempts`, or at once if a retry cannot help, an OSError describes the failure in one line: PermissionError
    names the missing permission, FileNotFoundError a bucket that does not exist, TimeoutError a service that did not
    answer well in time. AbsentError and TakenError are separate from these.
    """

    def __init__(self, address: Address, attempts: int = ATTEMPTS) -> None:
        self.address = address
        self.attempts = attempts
        self._client = _client(address)
        weakref.finalize(self, self._client.close)  # its connections

    def call(self, operation: str, key: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request, by boto3's names of the operation and of its parameters; `key` may be empty."""
        arguments: dict[str, Any] = {"Bucket": self.address.bucket}
        if key:
            arguments["Key"] = key
        arguments |= parameters or {}
        return self._retry(operation, key, lambda: getattr(self._client, operation)(**arguments))

    def pages(
        self, operation: str, key: str, parameters: Mapping[str, Any], items: str
    ) -> Iterator[dict[str, Any]]:
        """Return the entries of the field `items`, page by page."""
        marker: dict[str, Any] = {}
        while True:
            page = self.call(operation, key, {**parameters, **marker})
            yield from page.get(items, [])
            if not page.get("IsTruncated"):
                return
            marker = {name: page[field] for name, field in _NEXT_PAGE[operation].items()}

    def listed(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Return all objects whose keys start with `prefix`."""
        return self.pages("list_objects_v2", "", {"Prefix": prefix}, "Contents")

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of an object, or those from `start` up to `end`. An interrupted answer is read anew."""
        parameters = {"Bucket": self.address.bucket, "Key": key}
        if end is not None:
            parameters["Range"] = f"bytes={start}-{end - 1}"

        def read() -> bytes:
            content: bytes = self._client.get_object(**parameters)["Body"].read()
            return content

        return self._retry("get_object", key, read)

    def create(self, key: str, content: bytes, metadata: Mapping[str, str]) -> None:
        """Write an object only if it is absent. TakenError if it exists."""
        checksum = encoded(hashlib.sha256(content).digest())
        parameters = {
            "Body": content,
            "IfNoneMatch": "*",
            "Metadata": dict(metadata),
            "ChecksumSHA256": checksum,
        }
        self.call("put_object", key, parameters)

    def put(self, key: str, content: bytes, sha256: bytes | None = None) -> None:
        """Write an object; S3 compares its checksum."""
        checksum = encoded(sha256 or hashlib.sha256(content).digest())
        self.call("put_object", key, {"Body": content, "ChecksumSHA256": checksum})

    def _retry(self, operation: str, key: str, send: Callable[[], T]) -> T:
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            return retrying(send)
        except (BotoCoreError, ClientError) as error:
            # Without the chain: the service's answer may name keys and accounts.
            raise self._one_line(operation, key, error, retrying.statistics["attempt_number"]) from None

    def _one_line(
        self, operation: str, key: str, error: BotoCoreError | ClientError, attempts: int
    ) -> Exception:
        """Return the exception that describes an error of boto3 in one line."""
        permission = _PERMISSIONS[operation]
        object_url = f"s3://{self.address.bucket}/{key}"
        endpoint = f" at {self.address.endpoint}" if self.address.endpoint else ""
        if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
            return PermissionError(
                "no AWS credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "give this machine a role"
            )
        code, status = _answer(error)
        if code == "NoSuchBucket":
            return FileNotFoundError(
                f"there is no bucket {self.address.bucket}{endpoint}: create it, or name another"
            )
        if status == 412:
            return TakenError(f"{object_url} exists already")
        if status == 404:
            return AbsentError(f"there is no {object_url}")
        if code in _INVALID_CREDENTIALS:
            return PermissionError(f"the credentials for {self.address} were refused ({code})")
        if status == 403:
            return PermissionError(f"these credentials may not do {permission} on {object_url} ({code})")
        if _is_transient(error):
            return TimeoutError(
                f"{permission} on {object_url}{endpoint} failed {attempts} times, the last time with {code}"
            )
        return OSError(f"{permission} on {object_url}{endpoint} failed with {code}")


def encoded(digest: bytes) -> str:
    """Return a checksum in the encoding of S3's requests."""
    return base64.b64encode(digest).decode()


def _client(address: Address) -> Any:
    style = {None: "auto", True: "path", False: "virtual"}[address.path_style]
    config = Config(
        # All retries are ours: botocore's own quota of retries would be used up in a bad hour.
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={} if address.path_style is None else {"addressing_style": style},
        connect_timeout=10, read_timeout=60, max_pool_connections=2 * AT_ONCE,
    )  # fmt: skip
    try:
        # A separate session: boto3's shared one must not be used by several threads.
        return boto3.Session().client("s3", endpoint_url=address.endpoint, config=config)
    except BotoCoreError as error:  # such as a profile that does not exist
        raise OSError(f"{address} can't be opened: {error}") from None


def _answer(error: BaseException) -> tuple[str, int]:
    """Return the code and the HTTP status of an error; its class name and 0 if there was no answer."""
    if not isinstance(error, ClientError):
        return type(error).__name__, 0
    answer: Mapping[str, Any] = error.response
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return str(answer.get("Error", {}).get("Code", status)), status


def _is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, ClientError):
        code, status = _answer(error)
        return status >= 500 or status == 429 or code in _TRANSIENT
    return isinstance(
        error, (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    )
