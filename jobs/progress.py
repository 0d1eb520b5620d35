"""How a job reports its progress, and how it is interrupted."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done; each call renews the attempt's lease. It may raise
Interrupted."""


class JobInterruptedError(Exception):
    """The work is to stop here and go on elsewhere: its machine goes away. together: every rank stops for it."""

    def __init__(self, why: str = "", together: bool = False) -> None:
        super().__init__(why)
        self.together = together
