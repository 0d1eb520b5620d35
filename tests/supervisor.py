"""Run a command until this process's standard input is closed, then end all its descendants.

    python supervisor.py COMMAND …

All descendants of the command remain descendants of this process, even if they detach themselves or outlive their
parent. They are ended when the standard input is closed, or its other end dies, or the command ends. The exit status is
the command's; a signal N is reported as 128 + N. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER, see prctl(2)
GRACE_SECONDS = 5.0
"""The time that the command has to end after SIGTERM."""


def main() -> int:
    if ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1) != 0:
        raise OSError("orphans cannot be adopted here")
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    status = None
    while status is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        status = reaped(command.pid)
    if status is None:
        command.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while (status := reaped(command.pid)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        ended = reaped(command.pid)
        if status is None:
            status = ended
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status or 0) % 256


def reaped(pid: int) -> int | None:
    """Reap all children that have ended; return the wait status of the child with this pid, if it is one of them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                status = ended[1]
    return status


if __name__ == "__main__":
    sys.exit(main())
