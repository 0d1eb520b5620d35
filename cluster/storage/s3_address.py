"""Address: where an S3 store is, read from its s3:// address."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

_CACHE_GB = 20.0
"""The default size of the copies on one machine, in gigabytes."""
_OPTIONS = ("endpoint", "path_style", "cache_gb")


@dataclass(frozen=True)
class Address:
    """s3://BUCKET/PREFIX?endpoint=URL&path_style=true&cache_gb=20; each option may be left out.

    Credentials come from boto3's own settings, never from the address.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    """The URL of another service than AWS; without it AWS_ENDPOINT_URL_S3 and boto3's other settings apply."""
    path_style: bool | None = None
    """Whether the bucket is in the URL's path instead of its host name; None leaves the choice to boto3."""
    cache_gb: float = _CACHE_GB
    """The gigabytes of artifacts that one machine keeps."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse(address: str) -> Address:
    """Read an address. ValueError describes a problem, without parts of the address that may be a secret."""
    url = urlsplit(address)
    options = parse_qs(url.query, keep_blank_values=True)
    endpoint = options["endpoint"][-1] if "endpoint" in options else None
    if "@" in url.netloc or (endpoint is not None and "@" in urlsplit(endpoint).netloc):
        raise ValueError("an address of a store holds no credentials; boto3 finds them in AWS's own settings")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", url.netloc):
        raise ValueError(f"{url.netloc!r} is no bucket's name; give s3://bucket/prefix")
    prefix = _check_prefix(url.path.strip("/"))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown or url.fragment:
        raise ValueError(
            f"{', '.join(unknown) or '#'} is no option of a store; there are {', '.join(_OPTIONS)}"
        )
    if endpoint is not None:
        _check_endpoint(endpoint)
    return Address(url.netloc, prefix, endpoint, _path_style(options), _cache_gb(options))


def _check_prefix(prefix: str) -> str:
    for part in prefix.split("/"):
        if prefix and not re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9!_.*'()=-]+", part):
            raise ValueError(
                f"{prefix!r} is no prefix; give words of letters, digits and -_.=!*'() between slashes"
            )
    return prefix


def _check_endpoint(endpoint: str) -> None:
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("endpoint is no http:// or https:// address")


def _path_style(options: Mapping[str, Sequence[str]]) -> bool | None:
    text = options.get("path_style", [""])[-1]
    if text not in ("", "true", "false"):
        raise ValueError(f"path_style={text} is neither true nor false")
    if not text:
        return None
    return text == "true"


def _cache_gb(options: Mapping[str, Sequence[str]]) -> float:
    text = options.get("cache_gb", [str(_CACHE_GB)])[-1]
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"cache_gb={text} is no number of gigabytes")
    return float(text)
