"""Submit: programs that a cluster runs by itself, through Ray's Jobs API. The door to that API.

What fails is one line: ConnectionError where the cluster does not answer, PermissionError where it does not let us
in, OSError for the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib import metadata as installed
from pathlib import Path
from typing import Any

from cluster.on_ray import auth

LIMIT_BYTES = 100 * 2**20
"""The largest package that a cluster takes (Ray 2.60: DASHBOARD_CLIENT_MAX_SIZE); a larger one is answered with 413."""
_STOPPING_SECONDS = 15.0
"""So long at most is waited for a program to end that was told to: Ray kills it after 3 s."""


def in_job() -> bool:
    """Whether this process is a job that was submitted to a cluster, or descends from one."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@dataclass(frozen=True)
class JobState:
    """A job as the cluster tells of it. status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. began: seconds since
    the epoch, 0 before it did."""

    id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    began: float = 0.0

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Node:
    """A node that is up, as the cluster tells of it. type: what the autoscaler calls its kind, empty without one."""

    type: str
    head: bool
    cpus: float
    gpus: float
    memory_gib: float


class Jobs:
    """The jobs of one cluster, at the address of its dashboard (http://head:8265).

    Making one checks the way there: that the cluster asks for a token (see `auth.header`) and takes ours, and that its
    Ray and Python are those of this machine; RuntimeError names them where they are not. Nothing is started by that.
    """

    def __init__(self, address: str, insecure: bool = False) -> None:
        self.address = auth.dashboard(address)
        headers = auth.header(self.address, insecure)
        os.environ.setdefault("RAY_AUTH_MODE", "token" if headers else "disabled")
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            self.address
        )  # else Ray would take RAY_ADDRESS instead of what is given
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._one_line():
            self._client = JobSubmissionClient(self.address, headers=dict(headers))
        self._check_versions()

    def on_this_machine(self) -> bool:
        """Whether the cluster's head runs here: its session's files lie here. An address alone does not tell, as
        127.0.0.1 may lead through a tunnel."""
        sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
        return (sessions / str(self._told("/api/version")["session_name"])).is_dir()

    def nodes(self) -> list[Node]:
        """The nodes that are up now, the head first. What more an autoscaler could start this API does not tell."""
        told = [one["raylet"] for one in self._told("/nodes?view=summary")["data"]["summary"]]
        return sorted(
            (_node(one) for one in told if one["state"] == "ALIVE"),
            key=lambda node: (not node.head, node.type),
        )

    def scaling(self) -> str:
        """What the autoscaler says of itself, as `ray status` prints it."""
        return str(self._told("/api/cluster_status?format=1")["data"]["clusterStatus"])

    def submit(self, id: str, entrypoint: str, package: Path, metadata: Mapping[str, str]) -> None:
        """Start `entrypoint` in the unpacked .zip, on the head. FileExistsError if there is a job of this id.
        None of what is given may be a secret: Ray shows it to whoever may see the cluster's state."""
        self._submit(id, entrypoint, str(package), metadata)

    def again(self, id: str, ended: str) -> None:
        """Start once more, by another id, what the job `ended` ran. LookupError where its package is gone: a cluster
        drops it some time after the job's end."""
        with self._one_line():
            details = self._client.get_job_info(ended)
            package = str((details.runtime_env or {}).get("working_dir"))
            held = self._client._package_exists(package)
        if not held:
            raise LookupError(
                f"the cluster at {self.address} has dropped the package of {ended}: slimfront submit sends it again"
            )
        self._submit(id, str(details.entrypoint), package, details.metadata or {})

    def all(self) -> list[JobState]:
        """Every job that was submitted to this cluster, in the order in which they began."""
        with self._one_line():
            details = self._client.list_jobs()
        states = [_state(one) for one in details if one.submission_id]
        return sorted(states, key=lambda state: state.began)

    def state(self, id: str) -> JobState:
        with self._one_line():
            return _state(self._client.get_job_info(id))

    def log(self, id: str) -> str:
        """All that a job has written so far."""
        with self._one_line():
            return str(self._client.get_job_logs(id))

    def follow(self, id: str, show: Callable[[str], None]) -> JobState:
        """Show what a job writes, from its beginning on, until it ends. Ctrl-C leaves it running."""
        shown = 0
        while True:
            with self._one_line():
                shown = asyncio.run(self._tail(id, show, shown))
            if (state := self.state(id)).ended:
                return state
            time.sleep(1)  # a proxy cuts connections now and then: the job goes on, and so does this

    def stop(self, id: str) -> JobState:
        """Tell a job to end, and wait until it has. One that has ended stays as it is."""
        with self._one_line():
            self._client.stop_job(id)
        deadline = time.monotonic() + _STOPPING_SECONDS
        while not (state := self.state(id)).ended and time.monotonic() < deadline:
            time.sleep(0.2)
        return state

    def _submit(self, id: str, entrypoint: str, package: str, metadata: Mapping[str, str]) -> None:
        with self._one_line():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=id,
                    runtime_env={"working_dir": package},
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise FileExistsError(f"the cluster has a job {id} already") from None

    async def _tail(self, id: str, show: Callable[[str], None], shown: int) -> int:
        """Show what comes after the first `shown` characters; returns how many there were in all."""
        seen = 0
        try:
            async with aclosing(self._client.tail_job_logs(id)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if seen + len(piece) > shown:
                        show(piece[max(0, shown - seen) :])
                    seen += len(piece)
        except RuntimeError as error:
            if "closed unexpectedly" not in str(error):
                raise
        return max(seen, shown)

    def _check_versions(self) -> None:
        cluster = self._told("/api/v0/cluster_metadata")["data"]
        here = {"Ray": installed.version("ray"), "Python": platform.python_version()}
        there = {"Ray": str(cluster["rayVersion"]), "Python": str(cluster["pythonVersion"])}
        if (here["Ray"], _minor(here["Python"])) != (there["Ray"], _minor(there["Python"])):
            told = [", ".join(f"{name} {version}" for name, version in one.items()) for one in (there, here)]
            raise RuntimeError(
                f"the cluster at {self.address} has {told[0]}, this machine {told[1]}: make them the same"
            )

    def _told(self, path: str) -> dict[str, Any]:
        with self._one_line():
            answer = self._client._do_request("GET", path)
            answer.raise_for_status()
            told: dict[str, Any] = answer.json()
            return told

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        from aiohttp import ClientError  # what Ray follows logs with
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise PermissionError(
                f"the cluster at {self.address} does not take this token; compare RAY_AUTH_TOKEN, the file "
                "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token with the cluster's"
            ) from None
        except RuntimeError as error:
            raise OSError(f"the cluster at {self.address}: {str(error).splitlines()[0]}") from None
        except FileExistsError:
            raise
        except (OSError, ClientError) as error:
            raise ConnectionError(
                f"no answer from the cluster at {self.address}: {type(error).__name__}"
            ) from None


def _state(details: Any) -> JobState:
    return JobState(
        str(details.submission_id),
        str(details.status.value),
        details.message or "",
        details.metadata or {},
        (details.start_time or 0) / 1000,
    )


def _node(raylet: Mapping[str, Any]) -> Node:
    has = raylet["resourcesTotal"]
    cpus, gpus, memory = (float(has.get(key, 0.0)) for key in ("CPU", "GPU", "memory"))
    return Node(str(raylet.get("nodeTypeName", "")), bool(raylet["isHeadNode"]), cpus, gpus, memory / 2**30)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
