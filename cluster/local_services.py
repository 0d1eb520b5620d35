"""Local: a Ray head and an MLflow server on this machine, for as long as the command that started them runs.

    FOLDER/mlflow.db, mlflow-artifacts/    what MLflow holds
    FOLDER/.up/                            logs, the token, and which processes are ours

Both speak to this machine alone; the ports that Ray's own processes use among themselves ask for the token. Processes
are known by their pid and the time at which they began, so that what a killed command left is ended by the next one,
and nothing else is.
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
"""So long at most is waited for each to answer: MLflow takes 8 to 40 s on a new database, Ray some ten."""
_ENDING_SECONDS = 15.0
"""So long at most is waited for processes that were told to end: a study that runs notes where it is."""
_LOOK_SECONDS = 1.0
_SAME_SECONDS = 2.0
"""Two processes of one pid that began less than this apart are one: what the system tells moves with its clock."""
_RAYS_OWN = range(10002, 20000)
"""The ports that Ray gives to its workers, and refuses for anything else."""


@dataclass(frozen=True)
class Ports:
    """Where the two listen: the dashboard of Ray, with its jobs, and MLflow."""

    dashboard: int = 8265
    mlflow: int = 5000


@dataclass(frozen=True)
class RecordedProcess:
    """A process of ours. began: in seconds since the epoch."""

    pid: int
    began: float


@dataclass(frozen=True)
class ServiceUrls:
    """What is up: the folder, the ports, and the file of the token where this made one."""

    folder: Path
    ports: Ports
    token_file: Path | None

    @property
    def dashboard(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.dashboard}"

    @property
    def mlflow(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.mlflow}"


Show = Callable[[Mapping[str, bool]], None]
"""Told which of the two answer by now, by their names."""


@contextmanager
def up(folder: Path, ports: Ports, show: Show) -> Iterator[LocalServices]:
    """Both, started and answering; ended on leaving, whatever the reason.

    FileExistsError where they are up in this folder already; OSError where a port is taken, or one of them does not
    start. What an earlier command left here when it was killed is ended first.
    """
    own = folder.absolute() / ".up"
    own.mkdir(parents=True, exist_ok=True)
    with (own / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(_is_up(own, folder)) from None
        local = LocalServices(own, ports)
        try:
            local.start(show)
            yield local
        finally:
            local.end()


class LocalServices:
    """The processes in one folder. `own` is its part that is this module's."""

    def __init__(self, own: Path, ports: Ports) -> None:
        self._own = own
        self._notes = own / "processes.json"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._known: set[RecordedProcess] = set()
        self._gcs_port = 0
        self.place = ServiceUrls(own.parent, ports, None)

    def start(self, show: Show) -> None:
        _end(_noted(self._notes))
        ports = self.place.ports
        _check_ports(ports)
        self._gcs_port, client = _free_ports(2)
        token, file = _token(self._own / "token")
        self.place = ServiceUrls(self.place.folder, ports, file)
        self._spawn("Ray", _head(ports, self._gcs_port, client), _rays_environment(file))
        self._spawn("MLflow", _server(self.place.folder, ports), _mlflows_environment())
        answers: dict[str, Callable[[], bool]] = {
            "Ray": lambda: _answers(f"{self.place.dashboard}/api/jobs/", token),
            "MLflow": lambda: _answers(f"{self.place.mlflow}/health", None),
        }
        deadline = time.monotonic() + START_SECONDS
        while not all((ready := {name: ask() for name, ask in answers.items()}).values()):
            show(ready)
            self._look()
            if time.monotonic() > deadline:
                late = [name for name, answered in ready.items() if not answered]
                raise TimeoutError(
                    f"{' and '.join(late)} did not answer in {START_SECONDS:g} s; see {self._own}"
                )
            time.sleep(_LOOK_SECONDS / 2)
        show(ready)
        self._look()

    def watch(self) -> None:
        """Wait until one of the two ends by itself, which is an OSError, or a signal ends this."""
        while True:
            self._look()
            time.sleep(_LOOK_SECONDS)

    def end(self) -> None:
        """End all that was ever seen to be ours, and what it started since."""
        with contextlib.suppress(OSError):
            self._look()
        _end(self._known)
        self._notes.unlink(missing_ok=True)
        for process in self._started.values():
            process.wait()
        _forget_cluster(self._gcs_port)

    def _spawn(self, name: str, command: list[str], env: Mapping[str, str]) -> None:
        with self._log(name).open("wb") as log:
            # Ctrl-C is for the command, which ends them in order.
            self._started[name] = subprocess.Popen(
                command,
                cwd=self._own,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._note()

    def _look(self) -> None:
        """Note which processes are ours now. OSError where one of the two has ended."""
        self._note()
        for name, process in self._started.items():
            if process.poll() is not None:
                raise OSError(f"{name} ended by itself: {_last_line(self._log(name))} ({self._log(name)})")

    def _note(self) -> None:
        """Kept for good: some outlive what started them, and are nobody's children then."""
        found = self._known | {one for process in self._started.values() for one in _family(process.pid)}
        if found != self._known:
            self._known = found
            told = {
                "dashboard": self.place.dashboard,
                "mlflow": self.place.mlflow,
                "processes": [[one.pid, one.began] for one in found],
            }
            draft = self._notes.with_suffix(".draft")
            draft.write_text(json.dumps(told))
            draft.replace(self._notes)

    def _log(self, name: str) -> Path:
        return self._own / f"{name.lower()}.log"


def _head(ports: Ports, gcs_port: int, client_port: int) -> list[str]:
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true",
        f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports.dashboard}",
        f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]  # fmt: skip


def _server(folder: Path, ports: Ports) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(ports.mlflow), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--serve-artifacts",
        "--artifacts-destination", str(folder / "mlflow-artifacts"),
    ]  # fmt: skip


def _rays_environment(token_file: Path | None) -> dict[str, str]:
    # Jobs run `python`, which is to be this one; and a job's own packages must come before what lies here.
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        **({"RAY_AUTH_TOKEN_PATH": str(token_file)} if token_file else {}),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


def _mlflows_environment() -> dict[str, str]:
    return os.environ | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluations by language models, not ours
    }


def _token(file: Path) -> tuple[str, Path | None]:
    """The token to ask for: the one that Ray's commands would find here, else one of our own in `file`."""
    known = auth.token()
    if known is not None:
        return known, None
    if not file.is_file():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(32))
    return file.read_text(), file


def _answers(url: str, token: str | None) -> bool:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise PermissionError(f"{url} does not take the token that it was started with") from None
        return False
    except OSError:
        return False


def _check_ports(ports: Ports) -> None:
    """OSError where one is taken. ValueError where Ray would refuse it."""
    if ports.dashboard in _RAYS_OWN:
        raise ValueError(
            f"--dashboard-port={ports.dashboard}: Ray keeps {_RAYS_OWN.start} to {_RAYS_OWN.stop - 1} for its workers"
        )
    for option, port in (("--dashboard-port", ports.dashboard), ("--mlflow-port", ports.mlflow)):
        with socket.socket() as tried:
            tried.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # one that has just been let go is free
            try:
                tried.bind((LOOPBACK, port))
            except OSError as error:
                raise OSError(
                    f"port {port} is not free ({error.strerror}): give another with {option}"
                ) from None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _family(pid: int) -> list[RecordedProcess]:
    """A process and all below it, as far as they live."""
    try:
        process = psutil.Process(pid)
        every = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    found = []
    for one in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(RecordedProcess(one.pid, one.create_time()))
    return found


def _end(known: set[RecordedProcess]) -> None:
    """Tell all of these that live, and all below them, to end; kill those that have not after a while."""
    ours: dict[int, psutil.Process] = {}
    for one in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(one.pid)
            if abs(process.create_time() - one.began) < _SAME_SECONDS:
                ours |= {each.pid: each for each in (process, *process.children(recursive=True))}
    for process in ours.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(list(ours.values()), timeout=_ENDING_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _noted(notes: Path) -> set[RecordedProcess]:
    try:
        return {RecordedProcess(*one) for one in json.loads(notes.read_text())["processes"]}
    except FileNotFoundError:
        return set()


def _is_up(own: Path, folder: Path) -> str:
    try:
        told = json.loads((own / "processes.json").read_text())
    except FileNotFoundError:
        return f"another process is starting or ending what is up in {folder}"
    return f"up in {folder} already: Ray at {told['dashboard']}, MLflow at {told['mlflow']}"


def _forget_cluster(gcs_port: int) -> None:
    """Let Ray's commands not look for a cluster that is gone: a head that is told to end leaves its address behind."""
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        if file.read_text().endswith(f":{gcs_port}"):
            file.unlink()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"
