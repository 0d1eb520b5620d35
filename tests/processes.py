"""Servers for tests and benchmarks, each ended with all its descendants."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

SUPERVISOR = Path(__file__).parent / "supervisor.py"
ENDING_SECONDS = 60.0


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[psutil.Popen]:
    """Run a command under a supervisor and yield the supervisor's process, whose descendants are the command's.

    All of them end with the block, or when this process dies. Their output goes to `log`.
    """
    with log.open("ab") as out:
        supervisor = psutil.Popen(
            [sys.executable, str(SUPERVISOR), *command], cwd=cwd, env=None if env is None else dict(env),
            stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield supervisor
    finally:
        supervisor.stdin.close()
        supervisor.wait(ENDING_SECONDS)


def wait_for(name: str, is_up: Callable[[], bool], seconds: float, server: psutil.Popen, log: Path) -> None:
    """Wait until a server answers. RuntimeError with its log if it has ended or is too slow."""
    deadline = time.monotonic() + seconds
    while not is_up():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"{name} did not start within {seconds:g} s:\n{log.read_text(errors='replace')}"
            )
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def without_ray(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment without Ray's variables."""
    return {key: value for key, value in environ.items() if not key.startswith("RAY_")}


# One request at a time: moto checks whether an object exists and then writes it, in two steps; S3 does it in one.
S3_SERVER = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Start a server that behaves as S3 and yield its URL; it lists more than three objects page by page.

    Its log is in the folder.
    """
    (port,) = free_ports(1)
    log = folder / "s3.log"
    env = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "3"}
    with running([sys.executable, "-c", S3_SERVER, str(port)], log, env=env) as server:
        wait_for("moto's server", lambda: listening(port), 60, server, log)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Start an MLflow server with its data in the folder and yield its URL."""
    (port,) = free_ports(1)
    log = folder / "mlflow.log"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/mlflow",
    ]  # fmt: skip
    with running(command, log, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}) as server:
        wait_for("MLflow's server", lambda: listening(port), 120, server, log)
        yield f"http://127.0.0.1:{port}"
