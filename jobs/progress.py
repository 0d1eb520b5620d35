"""How a job reports its progress, and how it is interrupted."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[float, str], None]
"""Called with the finished share (0 to 1) and the current activity. Each call renews the attempt's lease, and may
raise `JobInterruptedError`."""


def no_report(share: float, activity: str) -> None:
    """Report nothing."""


class JobInterruptedError(Exception):
    """The job must stop here and continue on another machine, because this one will be taken away."""

    def __init__(self, reason: str = "", on_all_ranks: bool = False) -> None:
        super().__init__(reason)
        self.on_all_ranks = on_all_ranks
        """Whether all ranks of a gang stop for it at the same step."""
