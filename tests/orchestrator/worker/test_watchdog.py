"""The watchdog ends work that hangs, wherever it hangs, and leaves work that reports."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.job import Job, Success
from jobs.meters import text
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.worker.watchdog import STALL_SECONDS, Lease
from orchestrator.worker.work import WorkerContext, work

# The program reports for longer than its lease is valid, then hangs without releasing the interpreter lock.
PROGRAM = """
import re
import time
from orchestrator.worker.watchdog import Lease

lease = Lease()
began = time.monotonic()
while time.monotonic() - began < 3:
    lease.renew()
    time.sleep(0.05)
print("hangs", flush=True)

def hang():
    re.match("(a+)+$", "a" * 60 + "b")

hang()
"""


def test_hanging_work_is_ended_with_a_traceback(tmp_path: Path) -> None:
    env = {**os.environ, STALL_SECONDS: "1.5"}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.stdout == "hangs\n"
    assert process.returncode == 1
    assert "in hang" in process.stderr


def test_a_job_renews_its_lease_at_each_report_and_releases_it_at_the_end(
    prepared: Callable[..., PreparedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 64)  # eight batches
    renewed, cancelled = list[float](), list[int]()
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **options: renewed.append(seconds)
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(len(renewed)))
    ready = prepared()
    context = WorkerContext(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")
    assert isinstance(work(Job(ready.plan.original, (), "materials"), context), Success)
    assert renewed == cancelled == []  # stall detection is disabled
    monkeypatch.setenv(STALL_SECONDS, "1e-6")
    assert isinstance(work(Job(ready.plan.original, ("text",), "materials"), context), Success)
    assert len(renewed) > 8
    assert cancelled == [len(renewed)]


def test_frequent_reports_renew_the_lease_once(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[float] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **options: renewed.append(seconds)
    )
    monkeypatch.setenv(STALL_SECONDS, "3600")
    lease = Lease()
    for _ in range(100):
        lease.renew()
    assert renewed == [3600]
    later_seconds = time.monotonic() + 400
    monkeypatch.setattr(time, "monotonic", lambda: later_seconds)
    lease.renew()
    assert renewed == [3600, 3600]
