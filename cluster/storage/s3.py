"""Bucket: requests to S3, made again until they do well, and what went wrong in one line. The door to boto3."""

from __future__ import annotations

import base64
import hashlib
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

T = TypeVar("T")

AT_ONCE = 4
"""So many requests are under way at once."""
ATTEMPTS = 12
"""Of each request, some 45 s in all: where 30 % of them fail, one of two million is given up."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 20.0
_CACHE_GB = 20.0
_OPTIONS = ("endpoint", "path_style", "cache_gb")

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
"""What credentials must allow for each operation."""
_NEXT_PAGE = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
    "list_parts": {"PartNumberMarker": "NextPartNumberMarker"},
}
_REFUSED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
}
_PASSING = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted",
            "ConditionalRequestConflict", "InternalError", "ServiceUnavailable"}  # fmt: skip


class AbsentError(LookupError):
    """There is no such object, or no such upload any more."""


class TakenError(FileExistsError):
    """An object of this key is there already."""


@dataclass(frozen=True)
class Address:
    """s3://BUCKET/PREFIX?endpoint=URL&path_style=true&cache_gb=20, each of the options only if needed.

    endpoint: of another service than AWS; without it AWS_ENDPOINT_URL_S3 and boto3's other settings count.
    path_style: whether the bucket is in the URL's path, not in the host's name; None leaves it to boto3.
    cache_gb: how much of what was fetched a machine keeps. Credentials are found where boto3 finds them, never here.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    path_style: bool | None = None
    cache_gb: float = _CACHE_GB

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse(address: str) -> Address:
    """Read an address. ValueError says what is wrong with it, without repeating what may be a secret."""
    url = urlsplit(address)
    options = parse_qs(url.query, keep_blank_values=True)
    unknown = sorted(options.keys() - set(_OPTIONS))
    endpoint = urlsplit(options["endpoint"][-1]) if "endpoint" in options else None
    if "@" in url.netloc or (endpoint is not None and "@" in endpoint.netloc):
        raise ValueError("an address of a store holds no credentials; boto3 finds them in AWS's own settings")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", url.netloc):
        raise ValueError(f"{url.netloc!r} is no bucket's name; give s3://bucket/prefix")
    prefix = url.path.strip("/")
    if prefix and not all(
        re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9!_.*'()=-]+", part) for part in prefix.split("/")
    ):
        raise ValueError(
            f"{prefix!r} is no prefix; give words of letters, digits and -_.=!*'() between slashes"
        )
    if unknown or url.fragment:
        raise ValueError(
            f"{', '.join(unknown) or '#'} is no option of a store; there are {', '.join(_OPTIONS)}"
        )
    if endpoint is not None and (endpoint.scheme not in ("http", "https") or not endpoint.hostname):
        raise ValueError("endpoint is no http:// or https:// address")
    style = options.get("path_style", [""])[-1]
    if style not in ("", "true", "false"):
        raise ValueError(f"path_style={style} is neither true nor false")
    limit = options.get("cache_gb", [str(_CACHE_GB)])[-1]
    if not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise ValueError(f"cache_gb={limit} is no number of gigabytes")
    given = options["endpoint"][-1] if endpoint is not None else None
    return Address(url.netloc, prefix, given, style == "true" if style else None, float(limit))


class Bucket:
    """Requests to one bucket. Each is made again, with growing random pauses, while that may help: `attempts` times.

    Then, or at once where trying cannot help, an OSError tells in one line what failed: PermissionError with the
    permission that is missing, FileNotFoundError where there is no such bucket, TimeoutError where the service did not
    answer well in time. Absent and Taken are told apart from these.
    """

    def __init__(self, address: Address, attempts: int = ATTEMPTS) -> None:
        self.address = address
        self.attempts = attempts
        self._client = _client(address)
        weakref.finalize(self, self._client.close)  # its connections

    def call(self, operation: str, key: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, by boto3's name of the operation and of its parameters; `key` may be empty."""
        named = {"Bucket": self.address.bucket, **({"Key": key} if key else {}), **(given or {})}
        return self._insist(operation, key, lambda: getattr(self._client, operation)(**named))

    def pages(
        self, operation: str, key: str, given: Mapping[str, Any], items: str
    ) -> Iterator[dict[str, Any]]:
        """What is listed under `items`, page by page."""
        after: dict[str, Any] = {}
        while True:
            page = self.call(operation, key, {**given, **after})
            yield from page.get(items, [])
            if not page.get("IsTruncated"):
                return
            after = {marker: page[next_one] for marker, next_one in _NEXT_PAGE[operation].items()}

    def listed(self, prefix: str) -> Iterator[dict[str, Any]]:
        """All objects whose keys start so."""
        return self.pages("list_objects_v2", "", {"Prefix": prefix}, "Contents")

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of an object, or those from `start` up to `end`. The whole answer is read again where it breaks."""
        given = {"Bucket": self.address.bucket, "Key": key}
        if end is not None:
            given["Range"] = f"bytes={start}-{end - 1}"

        def read() -> bytes:
            content: bytes = self._client.get_object(**given)["Body"].read()
            return content

        return self._insist("get_object", key, read)

    def create(self, key: str, content: bytes, metadata: Mapping[str, str]) -> None:
        """Write an object only if absent. Taken where one is there."""
        given = {"Body": content, "IfNoneMatch": "*", "Metadata": dict(metadata)}
        self.call("put_object", key, {**given, "ChecksumSHA256": encoded(hashlib.sha256(content).digest())})

    def put(self, key: str, content: bytes, sha256: bytes | None = None) -> None:
        """Write an object, whose checksum S3 compares."""
        checksum = encoded(sha256 or hashlib.sha256(content).digest())
        self.call("put_object", key, {"Body": content, "ChecksumSHA256": checksum})

    def _insist(self, operation: str, key: str, do: Callable[[], T]) -> T:
        """Do it, again and again while it may help."""
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception(_passing),
            reraise=True,
        )
        try:
            return retrying(do)
        except (BotoCoreError, ClientError) as error:
            # Without the chain: what the service answered may name keys and accounts.
            raise self._told(operation, key, error, retrying.statistics["attempt_number"]) from None

    def _told(self, operation: str, key: str, error: BotoCoreError | ClientError, attempts: int) -> Exception:
        """What an error of boto3 means, in one line."""
        permission = _PERMISSIONS[operation]
        place = f"s3://{self.address.bucket}/{key}"
        at = f" at {self.address.endpoint}" if self.address.endpoint else ""
        if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
            return PermissionError(
                "no AWS credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "give this machine a role"
            )
        code, status = _answer(error)
        if code == "NoSuchBucket":
            return FileNotFoundError(
                f"there is no bucket {self.address.bucket}{at}: create it, or name another"
            )
        if status == 412:
            return TakenError(f"{place} is there already")
        if status == 404:
            return AbsentError(f"there is no {place}")
        if code in _REFUSED:
            return PermissionError(f"the credentials for {self.address} were refused ({code})")
        if status == 403:
            return PermissionError(f"these credentials may not do {permission} on {place} ({code})")
        if _passing(error):
            return TimeoutError(
                f"{permission} on {place}{at} failed {attempts} times, the last time with {code}"
            )
        return OSError(f"{permission} on {place}{at} failed with {code}")


def encoded(digest: bytes) -> str:
    """A checksum as S3 is told it."""
    return base64.b64encode(digest).decode()


def _client(address: Address) -> Any:
    style = {None: "auto", True: "path", False: "virtual"}[address.path_style]
    config = Config(
        # Tried again in one place, ours: botocore's own quota of retries would be used up in a bad hour.
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={} if address.path_style is None else {"addressing_style": style},
        connect_timeout=10, read_timeout=60, max_pool_connections=2 * AT_ONCE,
    )  # fmt: skip
    try:
        # A session of its own: boto3's shared one must not be used by several threads.
        return boto3.Session().client("s3", endpoint_url=address.endpoint, config=config)
    except BotoCoreError as error:  # such as a profile that is not there
        raise OSError(f"{address} can't be opened: {error}") from None


def _answer(error: BaseException) -> tuple[str, int]:
    """The code and the HTTP status of an error; its kind and 0 where there was no answer."""
    if not isinstance(error, ClientError):
        return type(error).__name__, 0
    answer: Mapping[str, Any] = error.response
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return str(answer.get("Error", {}).get("Code", status)), status


def _passing(error: BaseException) -> bool:
    """Whether the same request may do better in a while."""
    if isinstance(error, ClientError):
        code, status = _answer(error)
        return status >= 500 or status == 429 or code in _PASSING
    return isinstance(
        error, (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    )
