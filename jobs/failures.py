"""Turn an exception into a failure that can be stored and sent."""

from __future__ import annotations

import errno
import traceback

import torch

from jobs.job import Failure, FailureKind
from jobs.progress import JobInterruptedError


def failure(error: BaseException) -> Failure:
    """Return the failure that an exception stands for. Its kind decides whether the job is tried again."""
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
    if isinstance(error, ValueError):
        return "invalid"
    return "bug"


def _allocation_failed(error: BaseException) -> bool:
    # The CPU's allocator and CUDA's libraries raise RuntimeError with these texts.
    texts = ("can't allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether a full disk caused an error.

    Libraries raise errors of their own, and cleaning up may raise another one, so the chain of causes is searched.
    """
    texts = (
        "database or disk is full",
        "No space left on device",
        "Disk quota exceeded",
        "PytorchStreamWriter failed writing",
        "unexpected pos ",
    )
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False
