"""Jobs: programs that a cluster runs by itself, through Ray's Jobs API. The only user of that API.

Errors are one line: ConnectionError if the cluster does not answer, PermissionError if it refuses our token, OSError
for all others.
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
"""The largest package that a cluster accepts (Ray 2.60: DASHBOARD_CLIENT_MAX_SIZE); a larger one is answered with
413."""
_STOPPING_SECONDS = 15.0
"""The longest wait for the end of a stopped program: Ray kills it after 3 s."""


def in_job() -> bool:
    """Return whether this process is a job that was submitted to a cluster, or a descendant of one."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@dataclass(frozen=True)
class JobState:
    """A job as the cluster reports it."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    metadata: Mapping[str, str]
    began: float = 0.0
    """The start time in seconds since 1970; 0 before the start."""

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Node:
    """A node that is up, as the cluster reports it."""

    type: str
    """The autoscaler's name of its type; empty without an autoscaler."""
    head: bool
    cpus: float
    gpus: float
    memory_gib: float


class Jobs:
    """The jobs of one cluster, at the address of its dashboard (http://head:8265).

    The constructor checks that the cluster requires a token (see `auth.header`) and accepts ours, and that its versions
    of Ray and Python are those of this machine; RuntimeError names them if they are not. It starts nothing.
    """

    def __init__(self, address: str, insecure: bool = False) -> None:
        self.address = auth.dashboard(address)
        headers = auth.header(self.address, insecure)
        os.environ.setdefault("RAY_AUTH_MODE", "token" if headers else "disabled")
        # Without this Ray would prefer RAY_ADDRESS to the address of this object.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._one_line_errors():
            self._client = JobSubmissionClient(self.address, headers=dict(headers))
        self._check_versions()

    def on_this_machine(self) -> bool:
        """Return whether the cluster's head runs here, that is, whether its session's files are here.

        The address does not show that: 127.0.0.1 may be the end of a tunnel.
        """
        sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
        return (sessions / str(self._get("/api/version")["session_name"])).is_dir()

    def nodes(self) -> list[Node]:
        """Return the nodes that are up now, the head first; nodes that an autoscaler could add are not known here."""
        raylets = [entry["raylet"] for entry in self._get("/nodes?view=summary")["data"]["summary"]]
        nodes = [_node(raylet) for raylet in raylets if raylet["state"] == "ALIVE"]
        return sorted(nodes, key=lambda node: (not node.head, node.type))

    def scaling(self) -> str:
        """Return the autoscaler's report, as `ray status` prints it."""
        return str(self._get("/api/cluster_status?format=1")["data"]["clusterStatus"])

    def submit(self, id: str, entrypoint: str, package: Path, metadata: Mapping[str, str]) -> None:
        """Run `entrypoint` on the head, in the unpacked .zip `package`. FileExistsError if a job has this id.

        The arguments must contain no secrets: Ray shows them to all users that can read the cluster's state.
        """
        self._submit(id, entrypoint, str(package), metadata)

    def again(self, id: str, ended: str) -> None:
        """Run the program of the job `ended` once more, under a new id.

        LookupError if the cluster has dropped its package, as it does some time after a job's end.
        """
        with self._one_line_errors():
            details = self._client.get_job_info(ended)
            package = str((details.runtime_env or {}).get("working_dir"))
            exists = self._client._package_exists(package)
        if not exists:
            raise LookupError(
                f"the cluster at {self.address} has dropped the package of {ended}: slimfront submit sends it again"
            )
        self._submit(id, str(details.entrypoint), package, details.metadata or {})

    def all(self) -> list[JobState]:
        """Return all jobs that were submitted to this cluster, in the order of their start."""
        with self._one_line_errors():
            jobs = self._client.list_jobs()
        states = [_state(details) for details in jobs if details.submission_id]
        return sorted(states, key=lambda state: state.began)

    def state(self, id: str) -> JobState:
        with self._one_line_errors():
            return _state(self._client.get_job_info(id))

    def log(self, id: str) -> str:
        """Return the output of a job so far."""
        with self._one_line_errors():
            return str(self._client.get_job_logs(id))

    def follow(self, id: str, show: Callable[[str], None]) -> JobState:
        """Show a job's output from its beginning until it ends. Ctrl-C leaves the job running."""
        shown_characters = 0
        while True:
            with self._one_line_errors():
                shown_characters = asyncio.run(self._tail(id, show, shown_characters))
            if (state := self.state(id)).ended:
                return state
            time.sleep(1)  # a proxy may cut the connection; the job continues, so this connects again

    def stop(self, id: str) -> JobState:
        """Stop a job and wait for its end, 15 s at most. A job that has ended is unchanged."""
        with self._one_line_errors():
            self._client.stop_job(id)
        deadline = time.monotonic() + _STOPPING_SECONDS
        while not (state := self.state(id)).ended and time.monotonic() < deadline:
            time.sleep(0.2)
        return state

    def _submit(self, id: str, entrypoint: str, package: str, metadata: Mapping[str, str]) -> None:
        with self._one_line_errors():
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

    async def _tail(self, id: str, show: Callable[[str], None], shown_characters: int) -> int:
        """Show the output after its first `shown_characters` characters; return the total number of characters."""
        received = 0
        try:
            async with aclosing(self._client.tail_job_logs(id)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    if received + len(chunk) > shown_characters:
                        show(chunk[max(0, shown_characters - received) :])
                    received += len(chunk)
        except RuntimeError as error:
            if "closed unexpectedly" not in str(error):
                raise
        return max(received, shown_characters)

    def _check_versions(self) -> None:
        cluster = self._get("/api/v0/cluster_metadata")["data"]
        local_ray, local_python = installed.version("ray"), platform.python_version()
        remote_ray, remote_python = str(cluster["rayVersion"]), str(cluster["pythonVersion"])
        if (local_ray, _minor(local_python)) != (remote_ray, _minor(remote_python)):
            raise RuntimeError(
                f"the cluster at {self.address} has Ray {remote_ray}, Python {remote_python}, "
                f"this machine Ray {local_ray}, Python {local_python}: make them the same"
            )

    def _get(self, path: str) -> dict[str, Any]:
        with self._one_line_errors():
            response = self._client._do_request("GET", path)
            response.raise_for_status()
            content: dict[str, Any] = response.json()
            return content

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        from aiohttp import ClientError  # Ray follows logs with aiohttp
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
    resources = raylet["resourcesTotal"]
    cpus, gpus, memory = (float(resources.get(key, 0.0)) for key in ("CPU", "GPU", "memory"))
    return Node(str(raylet.get("nodeTypeName", "")), bool(raylet["isHeadNode"]), cpus, gpus, memory / 2**30)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
