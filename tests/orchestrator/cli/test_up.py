"""`slimfront up` starts a Ray head and an MLflow server on one machine and leaves no process at its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from cluster import local_services
from cluster.local_services import RecordedProcess

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user without a token."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    return inherited | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}


def alive(records: list[RecordedProcess]) -> list[RecordedProcess]:
    living = []
    for record in records:
        try:
            process = psutil.Process(record.pid)
            if process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - record.began) < 1:
                living.append(record)
        except psutil.NoSuchProcess:
            continue
    return living


def recorded_processes(folder: Path) -> list[RecordedProcess]:
    content = json.loads((folder / ".up" / "processes.json").read_text())
    return [RecordedProcess(*fields) for fields in content["processes"]]


class Up:
    """The running command. `output` holds its lines up to the one that explains how to end it."""

    def __init__(self, folder: Path, ports: tuple[int, int], env: dict[str, str]) -> None:
        options = ["--dashboard-port", str(ports[0]), "--mlflow-port", str(ports[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "up", str(folder), *options],
            env=env, stdout=subprocess.PIPE, text=True, cwd=folder.parent,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.output = ""
        while "Ctrl-C ends both" not in self.output:
            line = self.process.stdout.readline()
            assert line, "the command ended before its services were up"
            self.output += line


@contextmanager
def started(folder: Path, ports: tuple[int, int], env: dict[str, str]) -> Iterator[Up]:
    """Run the services until Ctrl-C."""
    up = Up(folder, ports, env)
    try:
        yield up
    finally:
        up.process.send_signal(signal.SIGINT)
        up.process.communicate(timeout=60)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_a_study_is_submitted_and_tracked_and_no_process_survives_ctrl_c_or_a_restart_after_a_kill(
    study_file: Path, tmp_path: Path
) -> None:
    folder, ports, env = tmp_path / "up", (free_port(), free_port()), environment(tmp_path)

    def slimfront(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", *map(str, args)]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240
        )

    with started(folder, ports, env) as up:
        env["RAY_AUTH_TOKEN_PATH"] = str(folder / ".up" / "token")
        assert env["RAY_AUTH_TOKEN_PATH"] in up.output
        dashboard, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        second_start = slimfront("up", folder)
        assert second_start.returncode == 3
        assert f"already: Ray at {dashboard}, MLflow at {mlflow}" in second_start.stderr
        doctor = slimfront("doctor", "--address", dashboard)
        assert doctor.returncode == 0, doctor.stdout
        assert "1 head (" in doctor.stdout
        study = [study_file, "search.candidates=1", "--address", dashboard, f"tracking.uri={mlflow}"]
        submission = slimfront("submit", *study)
        assert submission.returncode == 0, submission.stdout + submission.stderr
        synced = slimfront("tracking", "sync", tmp_path / "runs" / "tiny")
        assert synced.returncode == 0, synced.stderr
        assert "smallest" in MlflowClient(mlflow).get_registered_model("tiny").aliases
        up.process.kill()
        up.process.wait()
        orphans = recorded_processes(folder)
        assert alive(orphans)
        with started(folder, ports, env):
            assert not alive(orphans)
            new_processes = recorded_processes(folder)
            assert new_processes
        assert not alive(new_processes)
        assert not (folder / ".up" / "processes.json").exists()


def test_a_port_in_use_is_reported_in_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "orchestrator",
            "up",
            str(tmp_path / "up"),
            "--mlflow-port",
            str(port),
        ]
        process = subprocess.run(
            [*command, "--dashboard-port", str(free_port())], env=environment(tmp_path), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
    assert process.returncode == 3
    assert f"port {port} is not free" in process.stderr
    assert "--mlflow-port" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "up" / ".up" / "processes.json").exists()


# A parent and its child, which both ignore SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-c", open("/proc/self/cmdline").read().split("\\0")[2], "child"])
print(flush=True)
time.sleep(60)
"""


def test_processes_of_a_killed_command_are_ended_and_other_processes_with_the_same_pid_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_services, "_ENDING_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        for _ in range(2):
            parent.stdout.readline()
        processes = local_services._descendants(parent.pid)
        assert len(processes) == 2
        local_services._end({RecordedProcess(process.pid, process.began - 100) for process in processes})
        assert alive(processes) == processes
        local_services._end({process for process in processes if process.pid == parent.pid})
        deadline = time.monotonic() + 10
        while alive(processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_token_is_created_once_for_this_user_only_and_an_existing_token_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    token, created = local_services._token(file)
    assert created == file
    assert file.stat().st_mode & 0o777 == 0o600
    assert local_services._token(file) == (token, file)
    existing_token = secrets.token_hex(32)
    monkeypatch.setenv("RAY_AUTH_TOKEN", existing_token)
    assert local_services._token(file) == (existing_token, None)


def test_a_port_reserved_for_ray_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="--dashboard-port=12000: Ray keeps 10002 to 19999"):
        local_services._check_ports(local_services.Ports(dashboard=12000))
