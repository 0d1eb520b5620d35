"""End a worker process that makes no progress, so that its task is lost and tried again.

A hanging call may hold Python's global lock, so the timer is the one of faulthandler: it runs without the lock, prints
the stack and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import time

STALL_SECONDS = "SLIMFRONT_STALL_SECONDS"
"""The environment variable of a worker with the seconds without a report after which it is assumed to hang. A process
without the variable never ends itself."""
_STDERR = 2
_RENEWALS = 10
"""The number of renewals within the duration of a lease, at most."""


class Lease:
    """The time until this process ends itself. Each report of progress renews it."""

    def __init__(self) -> None:
        self._seconds: float | None = None
        if STALL_SECONDS in os.environ:
            self._seconds = float(os.environ[STALL_SECONDS])
        self._renewed_at = 0.0
        self.renew()

    def renew(self) -> None:
        now = time.monotonic()
        if self._seconds is not None and now - self._renewed_at >= self._seconds / _RENEWALS:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)
            self._renewed_at = now

    def end(self) -> None:
        """Stop the timer: the work is done."""
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
