"""Runs a command until this process's standard input is closed, and leaves nothing of it behind.

    python supervisor.py COMMAND …

Whatever the command starts, and what that starts, stays below this process, also what detaches itself or outlives its
parent: all of it is ended when whoever holds the other end of the standard input closes it, or dies, or the command
ends. Its exit status is the command's; -9 and the like are told as 128 + 9. Linux only.
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
"""So long the command has to end by itself, once it is told to."""


def main() -> int:
    if ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1) != 0:
        raise OSError("orphans can't be adopted here")
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    status = None
    while status is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        status = reaped(command.pid)
    if status is None:
        command.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while (status := reaped(command.pid)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        ended = reaped(command.pid)
        status = ended if status is None else status
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status or 0) % 256


def reaped(pid: int) -> int | None:
    """Take note of every child that has ended; the wait status of the one with this pid, if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                found = ended[1]
    return found


if __name__ == "__main__":
    sys.exit(main())
