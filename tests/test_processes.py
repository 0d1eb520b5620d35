"""What tests start beside themselves is gone when they are."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.processes import SUPERVISOR, running

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
DAEMON = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True)
print(child.pid, flush=True)
if "stay" in sys.argv:
    time.sleep(600)
"""


def until(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happened()


def test_what_a_server_started_ends_with_the_block_even_if_it_detached_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running([sys.executable, "-c", DAEMON, "stay"], log) as server:
        assert until(lambda: log.read_text().endswith("\n"))
        daemon = psutil.Process(int(log.read_text()))
        assert daemon in server.children(recursive=True)
    assert not daemon.is_running()


@pytest.mark.parametrize("stay", [["stay"], []])
def test_it_ends_when_who_started_it_is_killed_or_when_its_command_ends(
    stay: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    code = (
        f"import sys, time; from pathlib import Path; sys.path.insert(0, {str(SUPERVISOR.parents[1])!r})\n"
        "from tests.processes import running\n"
        f"with running([sys.executable, '-c', {DAEMON!r}, *{stay!r}], Path({str(log)!r})) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        supervisor = psutil.Process(int(owner.stdout.readline()))
        assert until(lambda: log.exists() and log.read_text().endswith("\n"))
        daemon = int(log.read_text())
        if not stay:
            assert until(lambda: not psutil.pid_exists(daemon))
        owner.kill()
    assert until(lambda: not psutil.pid_exists(daemon) and not supervisor.is_running())
