"""The benchmark of overhead ends the mirror and no other process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from benchmarks.overhead import end_mirror


def test_only_the_mirror_is_ended() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen([*sleep, "orchestrator.tracking"]) as mirror, subprocess.Popen(sleep) as worker:
        try:
            end_mirror()
            assert mirror.wait(30) == -signal.SIGTERM
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(2)
        finally:
            mirror.kill()
            worker.kill()
