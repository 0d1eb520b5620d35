"""Preemption: whether this machine is about to be taken away, and when, by the cloud and by other sources."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path

POLL_SECONDS = 2.0
"""The interval between two requests. EC2 recommends 5 s; GCE leaves only 30 s in all."""
GCE_SECONDS = 30.0
"""The time between GCE's notice and the end of the machine."""

_NOTICE_FILE = "SLIMFRONT_NOTICE"
"""The environment variable with the file in which a watching process stores a notice, for itself and its children."""
_ANSWER_SECONDS = 1.0
_LINK_LOCAL = "http://169.254.169.254"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Requests without a proxy: the metadata service is on this machine's own link."""


@dataclass(frozen=True)
class Notice:
    """The announced end of this machine."""

    source: str
    """The service that announced it."""
    ends_at: float | None = None
    """The time of the end, in seconds since 1970; None if it is not known."""

    @property
    def seconds_left(self) -> float | None:
        if self.ends_at is None:
            return None
        return max(0.0, self.ends_at - time.time())


Source = Callable[[], Notice | None]
"""A service that is asked for a notice: None without a notice, and without an answer."""
Announce = Callable[[Notice], None]


def latest_notice() -> Notice | None:
    """Return the notice of this machine's end, if there is one. Takes microseconds, so it may be called at each step.

    Notices reach this process if `watch` was called in it, or in the process that started it.
    """
    file = os.environ.get(_NOTICE_FILE)
    if file is None:
        return None
    try:
        return Notice(**json.loads(Path(file).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def watch(sources: Sequence[Source] = (), announce: Announce | None = None) -> None:
    """Ask these sources, and the cloud's metadata service if there is one, until one of them gives notice.

    A thread asks every `POLL_SECONDS` and ends with the process. From the notice on `latest_notice` returns it;
    `announce` is called once. Without any source the thread ends at once.
    """
    file = Path(tempfile.gettempdir()) / f"slimfront-notice-{uuid.uuid4().hex}"
    os.environ[_NOTICE_FILE] = str(file)  # the file exists only after a notice
    threading.Thread(
        target=_watch, args=(file, sources, announce), name="slimfront-preempt", daemon=True
    ).start()


def _watch(file: Path, sources: Sequence[Source], announce: Announce | None) -> None:
    cloud = metadata_service()
    asked_sources = [*sources]
    if cloud is not None:
        asked_sources.append(cloud)
    while asked_sources:
        notice = _first_notice(asked_sources)
        if notice is not None:
            _write(file, notice)
            if announce is not None:
                announce(notice)
            return
        time.sleep(POLL_SECONDS)


def _first_notice(sources: Sequence[Source]) -> Notice | None:
    for source in sources:
        notice = source()
        if notice is not None:
            return notice
    return None


def _write(file: Path, notice: Notice) -> None:
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(asdict(notice)), encoding="utf-8")
    os.replace(draft, file)


def metadata_service() -> Source | None:
    """Return the cloud's service that announces this machine's end; None if none answers within seconds."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _ec2_token() is not None:
        return _ec2
    if _gce_flag() is not None:
        return _gce
    return None


def _ec2() -> Notice | None:
    """Return EC2's notice of a spot instance's end, two minutes before it. A status of 404 means no notice.

    docs.aws.amazon.com, "Spot Instance interruption notices": {"action": "terminate", "time": "2017-09-18T08:22:00Z"}.
    """
    token = _ec2_token()
    if token is None:
        return None
    headers = {"X-aws-ec2-metadata-token": token}
    answer = _answer(f"{_ec2_endpoint()}/latest/meta-data/spot/instance-action", headers)
    if answer is None:
        return None
    try:
        action = json.loads(answer.body)
        ends_at = datetime.fromisoformat(action["time"]).timestamp()
        return Notice(f"EC2 ({action['action']})", ends_at)
    except (ValueError, TypeError, KeyError):  # no notice, or an answer that is not EC2's
        return None


def _ec2_token() -> str | None:
    """Return a token of the metadata service's version 2; many machines have version 1, without tokens, disabled."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    answer = _answer(f"{_ec2_endpoint()}/latest/api/token", headers, "PUT")
    if answer is None or not answer.body or not answer.body.isprintable():
        return None
    return answer.body


def _ec2_endpoint() -> str:
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")


def _gce() -> Notice | None:
    """Return GCE's notice of a spot machine's end, 30 s before it."""
    if _gce_flag() != "TRUE":
        return None
    return Notice("GCE", time.time() + GCE_SECONDS)


def _gce_flag() -> str | None:
    """Return `instance/preempted` of GCE's metadata service: TRUE or FALSE; None if this machine is not GCE's."""
    host = os.environ.get("GCE_METADATA_HOST")
    endpoint = f"http://{host}" if host else _LINK_LOCAL
    answer = _answer(f"{endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if answer is None or answer.headers.get("Metadata-Flavor") != "Google":
        return None
    return answer.body.strip()


@dataclass(frozen=True)
class _Answer:
    body: str
    headers: Mapping[str, str]


def _answer(url: str, headers: Mapping[str, str], method: str = "GET") -> _Answer | None:
    """Send a request; return None if no service answers in time, or if it refuses."""
    try:
        request = urllib.request.Request(url, headers=dict(headers), method=method)
        with _DIRECT.open(request, timeout=_ANSWER_SECONDS) as response:
            return _Answer(response.read(4096).decode("utf-8", "replace"), response.headers)
    except (OSError, HTTPException, ValueError):  # ValueError for an endpoint that is no address
        return None
