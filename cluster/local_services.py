"""LocalServices: a Ray head and an MLflow server on this machine, while the command that started them runs.

    FOLDER/mlflow.db, mlflow-artifacts/    MLflow's data
    FOLDER/.up/                            logs, the token, and the list of processes

Both accept connections from this machine alone; the ports that Ray's processes use among themselves require the token.
Processes are identified by pid and start time, so that the next command ends those that a killed one left, and no
others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.on_ray import auth
from cluster.on_ray.connection import OBJECT_STORE_BYTES

LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0
"""The longest wait until both answer: MLflow takes 8 to 40 s on a new database, Ray some 10 s."""
_ENDING_SECONDS = 15.0
"""The longest wait for processes to end after SIGTERM: a running study records its state."""
_CHECK_SECONDS = 1.0
"""The interval between two checks of the processes."""
_SAME_SECONDS = 2.0
"""Two processes of one pid whose start times differ by less are one process: the times depend on the system's clock."""
_RAY_WORKER_PORTS = range(10002, 20000)
"""The ports that Ray gives to its workers, and refuses for anything else."""


@dataclass(frozen=True)
class Ports:
    """The ports of both services."""

    dashboard: int = 8265
    """Ray's dashboard, with its Jobs API."""
    mlflow: int = 5000


@dataclass(frozen=True)
class RecordedProcess:
    """A process that this module started, or a descendant of one."""

    pid: int
    began: float
    """The start time in seconds since 1970."""


@dataclass(frozen=True)
class ServiceUrls:
    """The running services."""

    folder: Path
    ports: Ports
    token_file: Path | None
    """The file of the token, if this module created one."""

    @property
    def dashboard(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.dashboard}"

    @property
    def mlflow(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.mlflow}"


Show = Callable[[Mapping[str, bool]], None]
"""Receives for each service, by its name, whether it answers."""


@contextmanager
def up(folder: Path, ports: Ports, show: Show) -> Iterator[LocalServices]:
    """Start both services, wait until they answer, and end them with the block, in any case.

    FileExistsError if they run in this folder already; OSError if a port is taken, or a service does not start.
    Processes that a killed command left in this folder are ended first.
    """
    state_folder = folder.absolute() / ".up"
    state_folder.mkdir(parents=True, exist_ok=True)
    with (state_folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(_already_up(state_folder, folder)) from None
        services = LocalServices(state_folder, ports)
        try:
            services.start(show)
            yield services
        finally:
            services.end()


class LocalServices:
    """The processes of both services. `state_folder` is the .up/ folder."""

    def __init__(self, state_folder: Path, ports: Ports) -> None:
        self._state_folder = state_folder
        self._process_list = state_folder / "processes.json"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._recorded: set[RecordedProcess] = set()
        self._gcs_port = 0
        self.urls = ServiceUrls(state_folder.parent, ports, None)

    def start(self, show: Show) -> None:
        _end(_read_processes(self._process_list))
        ports = self.urls.ports
        _check_ports(ports)
        self._gcs_port, client_port = _free_ports(2)
        token, token_file = _token(self._state_folder / "token")
        self.urls = ServiceUrls(self.urls.folder, ports, token_file)
        self._spawn("Ray", _ray_command(ports, self._gcs_port, client_port), _ray_environment(token_file))
        self._spawn("MLflow", _mlflow_command(self.urls.folder, ports), _mlflow_environment())
        self._wait_for_answers(token, show)

    def watch(self) -> None:
        """Wait until a signal ends this process. OSError if a service ends by itself."""
        while True:
            self._check()
            time.sleep(_CHECK_SECONDS)

    def end(self) -> None:
        """End all recorded processes, and their new descendants."""
        with contextlib.suppress(OSError):
            self._check()
        _end(self._recorded)
        self._process_list.unlink(missing_ok=True)
        for process in self._started.values():
            process.wait()
        _forget_cluster(self._gcs_port)

    def _wait_for_answers(self, token: str, show: Show) -> None:
        answers: dict[str, Callable[[], bool]] = {
            "Ray": lambda: _answers(f"{self.urls.dashboard}/api/jobs/", token),
            "MLflow": lambda: _answers(f"{self.urls.mlflow}/health", None),
        }
        deadline = time.monotonic() + START_SECONDS
        while not all((ready := {name: ask() for name, ask in answers.items()}).values()):
            show(ready)
            self._check()
            if time.monotonic() > deadline:
                late = [name for name, is_ready in ready.items() if not is_ready]
                raise TimeoutError(
                    f"{' and '.join(late)} did not answer in {START_SECONDS:g} s; see {self._state_folder}"
                )
            time.sleep(_CHECK_SECONDS / 2)
        show(ready)
        self._check()

    def _spawn(self, name: str, command: list[str], env: Mapping[str, str]) -> None:
        with self._log(name).open("wb") as log:
            # A session of its own: Ctrl-C goes to this command, which ends the services in order.
            self._started[name] = subprocess.Popen(
                command,
                cwd=self._state_folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._record()

    def _check(self) -> None:
        """Record the current processes. OSError if a service has ended."""
        self._record()
        for name, process in self._started.items():
            if process.poll() is not None:
                raise OSError(f"{name} ended by itself: {_last_line(self._log(name))} ({self._log(name)})")

    def _record(self) -> None:
        """Add new descendants to the list. They stay on it: some outlive their parents."""
        processes = set(self._recorded)
        for process in self._started.values():
            processes.update(_descendants(process.pid))
        if processes != self._recorded:
            self._recorded = processes
            state = {
                "dashboard": self.urls.dashboard,
                "mlflow": self.urls.mlflow,
                "processes": [[process.pid, process.began] for process in processes],
            }
            draft = self._process_list.with_suffix(".draft")
            draft.write_text(json.dumps(state))
            draft.replace(self._process_list)

    def _log(self, name: str) -> Path:
        return self._state_folder / f"{name.lower()}.log"


def _ray_command(ports: Ports, gcs_port: int, client_port: int) -> list[str]:
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true",
        f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports.dashboard}",
        f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]  # fmt: skip


def _mlflow_command(folder: Path, ports: Ports) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(ports.mlflow), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--serve-artifacts",
        "--artifacts-destination", str(folder / "mlflow-artifacts"),
    ]  # fmt: skip


def _ray_environment(token_file: Path | None) -> dict[str, str]:
    # Jobs run `python`, which must be this one; and a job's own packages must come before those of this folder.
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    if token_file:
        environment["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    return environment


def _mlflow_environment() -> dict[str, str]:
    return os.environ | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # These jobs are evaluations by language models, which slimfront does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _token(file: Path) -> tuple[str, Path | None]:
    """Return the token of Ray's settings, or a new one and its file."""
    configured = auth.token()
    if configured is not None:
        return configured, None
    if not file.is_file():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writer:
            writer.write(secrets.token_hex(32))
    return file.read_text(), file


def _answers(url: str, token: str | None) -> bool:
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise PermissionError(f"{url} does not take the token that it was started with") from None
        return False
    except OSError:
        return False


def _check_ports(ports: Ports) -> None:
    """Check that the ports are free. OSError if one is taken, ValueError if Ray would refuse it."""
    if ports.dashboard in _RAY_WORKER_PORTS:
        raise ValueError(
            f"--dashboard-port={ports.dashboard}: Ray keeps {_RAY_WORKER_PORTS.start} to "
            f"{_RAY_WORKER_PORTS.stop - 1} for its workers"
        )
    for option, port in (("--dashboard-port", ports.dashboard), ("--mlflow-port", ports.mlflow)):
        with socket.socket() as probe:
            # Without this option a port that was closed a moment ago would count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                raise OSError(
                    f"port {port} is not free ({error.strerror}): give another with {option}"
                ) from None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports: list[int] = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def _descendants(pid: int) -> list[RecordedProcess]:
    """Return a process and all its descendants that are alive."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    recorded = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            recorded.append(RecordedProcess(member.pid, member.create_time()))
    return recorded


def _end(recorded: set[RecordedProcess]) -> None:
    """Terminate those of these processes that are alive, and their descendants; kill those that do not end in time."""
    alive: dict[int, psutil.Process] = {}
    for entry in recorded:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(entry.pid)
            if abs(process.create_time() - entry.began) < _SAME_SECONDS:
                alive[process.pid] = process
                alive |= {child.pid: child for child in process.children(recursive=True)}
    for process in alive.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(list(alive.values()), timeout=_ENDING_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _read_processes(file: Path) -> set[RecordedProcess]:
    try:
        return {RecordedProcess(*fields) for fields in json.loads(file.read_text())["processes"]}
    except FileNotFoundError:
        return set()


def _already_up(state_folder: Path, folder: Path) -> str:
    """Return the message for a folder whose services another process runs."""
    try:
        state = json.loads((state_folder / "processes.json").read_text())
    except FileNotFoundError:
        return f"another process is starting or ending the services of {folder}"
    return f"up in {folder} already: Ray at {state['dashboard']}, MLflow at {state['mlflow']}"


def _forget_cluster(gcs_port: int) -> None:
    """Remove the address of the ended cluster, which a head leaves behind, so that Ray's commands do not use it."""
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        if file.read_text().endswith(f":{gcs_port}"):
            file.unlink()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        return "it wrote nothing"
    return lines[-1].strip()
