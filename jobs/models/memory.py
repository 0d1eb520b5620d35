"""Measure memory, and release it between the jobs of a process."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys

import psutil
import torch


def allocated_gib() -> float:
    """Return the GiB that tensors occupy on the GPU, or without a GPU the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    return int(psutil.Process().memory_info().rss) / 2**30


def device_gib() -> float:
    """Return the total memory of the GPU in GiB, or without a GPU that of this machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / 2**30
    return psutil.virtual_memory().total / 2**30


@functools.cache
def freeze_libraries() -> None:
    """Exclude all current objects from garbage collection; call it before a process loads its first model.

    Otherwise each collection walks the objects of all libraries again, which takes 0.3 s. Only the first call has an
    effect, since a frozen model, which contains cycles, would never be freed.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """Return freed memory to the system: modules contain reference cycles, and glibc keeps freed memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl does not have it
        if trim is not None:
            trim(0)
