"""Preempt: whether this machine is about to be taken away, and when: asked of the cloud and of who runs the cluster."""

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
"""EC2 advises to ask every 5 s; GCE leaves but 30 s in all."""
GCE_SECONDS = 30.0
"""What GCE leaves after it says so."""

_PLACE = "SLIMFRONT_NOTICE"
"""Names the file in which a process that watches tells of a notice, for itself and for the processes it starts."""
_ANSWER_SECONDS = 1.0
_LINK_LOCAL = "http://169.254.169.254"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""No proxy stands between a machine and what tells it about itself."""


@dataclass(frozen=True)
class Notice:
    """The announced end of this machine. source: who announced it; ends_at: in seconds since 1970, None where that was
    not told."""

    source: str
    ends_at: float | None = None

    @property
    def seconds_left(self) -> float | None:
        return None if self.ends_at is None else max(0.0, self.ends_at - time.time())


Source = Callable[[], Notice | None]
"""Who may tell of a notice: None while there is none, and where it does not answer."""
Announce = Callable[[Notice], None]


def latest_notice() -> Notice | None:
    """The notice that this process was given, or the one that started it. Takes microseconds: ask at every step."""
    place = os.environ.get(_PLACE)
    if place is None:
        return None
    try:
        return Notice(**json.loads(Path(place).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def watch(sources: Sequence[Source] = (), tell: Announce | None = None) -> None:
    """Ask these sources, and the cloud's metadata service where there is one, every `POLL_SECONDS` until one of them
    gives notice, in a thread that ends with the process. Whoever asks `noticed` from then on is told; `tell` is called
    once. Where there is no source nothing is asked."""
    place = Path(tempfile.gettempdir()) / f"slimfront-notice-{uuid.uuid4().hex}"
    os.environ[_PLACE] = str(place)  # the file is there only once there is a notice
    threading.Thread(
        target=_watch, args=(place, sources, tell), name="slimfront-preempt", daemon=True
    ).start()


def _watch(place: Path, sources: Sequence[Source], tell: Announce | None) -> None:
    service = metadata_service()
    asked = [*sources, *([] if service is None else [service])]
    while asked:
        notice = next((found for source in asked if (found := source()) is not None), None)
        if notice is not None:
            _write(place, notice)
            if tell is not None:
                tell(notice)
            return
        time.sleep(POLL_SECONDS)


def _write(place: Path, notice: Notice) -> None:
    beside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    beside.write_text(json.dumps(asdict(notice)), encoding="utf-8")
    os.replace(beside, place)


def metadata_service() -> Source | None:
    """The cloud's service that tells this machine of its end; None where none answers within seconds."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _ec2_token() is not None:
        return _ec2
    if _gce_flag() is not None:
        return _gce
    return None


def _ec2() -> Notice | None:
    """EC2's notice of a spot instance's end, two minutes before it. A 404 says that there is none.

    docs.aws.amazon.com, "Spot Instance interruption notices": {"action": "terminate", "time": "2017-09-18T08:22:00Z"}.
    """
    token = _ec2_token()
    if token is None:
        return None
    given = {"X-aws-ec2-metadata-token": token}
    answer = _answer(f"{_ec2_endpoint()}/latest/meta-data/spot/instance-action", given)
    try:
        told = json.loads(answer.body if answer else "null")
        ends_at = datetime.fromisoformat(told["time"]).timestamp()
        return Notice(f"EC2 ({told['action']})", ends_at)
    except (ValueError, TypeError, KeyError):  # none, or an answer that is not EC2's
        return None


def _ec2_token() -> str | None:
    """A token of the metadata service's second version: the first, without tokens, is switched off on many machines."""
    given = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    answer = _answer(f"{_ec2_endpoint()}/latest/api/token", given, "PUT")
    return answer.body if answer and answer.body.isprintable() and answer.body else None


def _ec2_endpoint() -> str:
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")


def _gce() -> Notice | None:
    """GCE's notice of a spot machine's end, 30 s before it."""
    return Notice("GCE", time.time() + GCE_SECONDS) if _gce_flag() == "TRUE" else None


def _gce_flag() -> str | None:
    """What GCE's metadata service says of `instance/preempted`: TRUE or FALSE; None where it is not GCE's."""
    host = os.environ.get("GCE_METADATA_HOST")
    endpoint = f"http://{host}" if host else _LINK_LOCAL
    answer = _answer(f"{endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return answer.body.strip() if answer and answer.headers.get("Metadata-Flavor") == "Google" else None


@dataclass(frozen=True)
class _Answer:
    body: str
    headers: Mapping[str, str]


def _answer(url: str, headers: Mapping[str, str], method: str = "GET") -> _Answer | None:
    """What is answered; None where nobody does in time, or refuses."""
    try:
        request = urllib.request.Request(url, headers=dict(headers), method=method)
        with _DIRECT.open(request, timeout=_ANSWER_SECONDS) as response:
            return _Answer(response.read(4096).decode("utf-8", "replace"), response.headers)
    except (OSError, HTTPException, ValueError):  # ValueError for an endpoint that is no address
        return None
