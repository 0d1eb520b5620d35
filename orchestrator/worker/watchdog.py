"""Lease: work that makes no progress ends its process, so that it is lost and tried again.

What hangs may hold Python itself: faulthandler's watchdog, which needs none, writes down where and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import time

STALL_SECONDS = "SLIMFRONT_STALL_SECONDS"
"""In a worker's environment: after so long without a report it is taken to hang. Elsewhere nothing is."""
_STDERR = 2
_RENEWALS = 10
"""So often at most a lease is renewed in the time that it is good for."""


class Lease:
    """This process's lease, where it needs one. Each report renews it."""

    def __init__(self) -> None:
        told = os.environ.get(STALL_SECONDS)
        self._seconds = None if told is None else float(told)
        self._renewed_at = 0.0
        self.renew()

    def renew(self) -> None:
        now = time.monotonic()
        if self._seconds is not None and now - self._renewed_at >= self._seconds / _RENEWALS:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)
            self._renewed_at = now

    def end(self) -> None:
        """The work is done: nothing ends this process any more."""
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
