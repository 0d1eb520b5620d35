"""Turn an exception into a failure that can be stored and sent."""

from __future__ import annotations

import errno
import traceback

import torch

from jobs.job import Failure, FailureKind
from jobs.progress import JobInterruptedError


def failure(error: BaseException) -> Failure:
    """The failure that an exception means: whether trying again can help follows from its kind."""
    trace = "".join(traceback.format_exception(error))
    return Failure(_kind(error), f"{type(error).__name__}: {error}", trace)


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, JobInterruptedError):
        return "preempted"
    if isinstance(error, FloatingPointError):
        return "diverged"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _allocation_failed(error):
        return "out_of_memory"
    if disk_is_full(error):
        return "disk_full"
    return "invalid" if isinstance(error, ValueError) else "bug"


def _allocation_failed(error: BaseException) -> bool:
    # So the CPU's allocator and CUDA's libraries report it, as a RuntimeError.
    told = ("can't allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error came of a full disk: libraries raise their own, and what cleans up may raise another."""
    told = (
        "database or disk is full",
        "No space left on device",
        "Disk quota exceeded",
        "PytorchStreamWriter failed writing",
        "unexpected pos ",
    )
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in told):
            return True
        error = error.__cause__ or error.__context__
    return False
