"""`slimfront up`: a Ray head and an MLflow server for one machine, and that nothing of them is left."""

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
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def environment(tmp_path: Path) -> dict[str, str]:
    """That of somebody who has no token yet."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    return inherited | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}


def alive(known: list[RecordedProcess]) -> list[RecordedProcess]:
    found = []
    for one in known:
        try:
            process = psutil.Process(one.pid)
            if process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - one.began) < 1:
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def noted(folder: Path) -> list[RecordedProcess]:
    return [
        RecordedProcess(*one)
        for one in json.loads((folder / ".up" / "processes.json").read_text())["processes"]
    ]


class Up:
    """The command, running. told: what it wrote until it said how to end it."""

    def __init__(self, folder: Path, ports: tuple[int, int], env: dict[str, str]) -> None:
        options = ["--dashboard-port", str(ports[0]), "--mlflow-port", str(ports[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "up", str(folder), *options],
            env=env, stdout=subprocess.PIPE, text=True, cwd=folder.parent,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.told = ""
        while "Ctrl-C ends both" not in self.told:
            line = self.process.stdout.readline()
            assert line, "it ended before it was up"
            self.told += line


@contextmanager
def started(folder: Path, ports: tuple[int, int], env: dict[str, str]) -> Iterator[Up]:
    """Up until Ctrl-C."""
    up = Up(folder, ports, env)
    try:
        yield up
    finally:
        up.process.send_signal(signal.SIGINT)
        up.process.communicate(timeout=60)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_a_study_is_submitted_and_tracked_and_after_ctrl_c_or_a_kill_nothing_is_left(
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
        assert env["RAY_AUTH_TOKEN_PATH"] in up.told
        dashboard, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        again = slimfront("up", folder)
        assert again.returncode == 3
        assert f"already: Ray at {dashboard}, MLflow at {mlflow}" in again.stderr
        looked = slimfront("doctor", "--address", dashboard)
        assert looked.returncode == 0, looked.stdout
        assert "1 head (" in looked.stdout
        study = [study_file, "search.candidates=1", "--address", dashboard, f"tracking.uri={mlflow}"]
        done = slimfront("submit", *study)
        assert done.returncode == 0, done.stdout + done.stderr
        synced = slimfront("tracking", "sync", tmp_path / "runs" / "tiny")
        assert synced.returncode == 0, synced.stderr
        assert "smallest" in MlflowClient(mlflow).get_registered_model("tiny").aliases
        up.process.kill()
        up.process.wait()
        left = noted(folder)
        assert alive(left)
        with started(folder, ports, env):
            assert not alive(left)
            ours = noted(folder)
            assert ours
        assert not alive(ours)
        assert not (folder / ".up" / "processes.json").exists()


def test_a_port_that_is_taken_is_one_line_and_nothing_runs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "orchestrator",
            "up",
            str(tmp_path / "up"),
            "--mlflow-port",
            str(port),
        ]
        done = subprocess.run(
            [*command, "--dashboard-port", str(free_port())], env=environment(tmp_path), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 3
    assert f"port {port} is not free" in done.stderr
    assert "--mlflow-port" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "up" / ".up" / "processes.json").exists()


# A parent with a child, neither of which heeds SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-c", open("/proc/self/cmdline").read().split("\\0")[2], "child"])
print(flush=True)
time.sleep(60)
"""


def test_what_a_killed_command_left_is_ended_by_its_start_and_another_process_of_that_pid_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_services, "_ENDING_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        for _ in range(2):
            parent.stdout.readline()
        ours = local_services._descendants(parent.pid)
        assert len(ours) == 2
        local_services._end({RecordedProcess(one.pid, one.began - 100) for one in ours})
        assert alive(ours) == ours
        local_services._end({one for one in ours if one.pid == parent.pid})
        deadline = time.monotonic() + 10
        while alive(ours):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_token_of_its_own_is_made_once_for_this_user_alone_and_a_known_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    token, made = local_services._token(file)
    assert made == file
    assert file.stat().st_mode & 0o777 == 0o600
    assert local_services._token(file) == (token, file)
    known = secrets.token_hex(32)
    monkeypatch.setenv("RAY_AUTH_TOKEN", known)
    assert local_services._token(file) == (known, None)


def test_a_port_of_rays_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="--dashboard-port=12000: Ray keeps 10002 to 19999"):
        local_services._check_ports(local_services.Ports(dashboard=12000))
