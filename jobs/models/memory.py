"""Memory: how much is held, and how to hand it back between jobs of one process."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys

import psutil
import torch


def held_gib() -> float:
    """What tensors hold of the device, where there is one; else what this process holds."""
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return held / 2**30


def device_gib() -> float:
    """All the memory of the device, where there is one; else of this machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / 2**30
    return psutil.virtual_memory().total / 2**30


@functools.cache
def settle() -> None:
    """Set the libraries aside before a process loads its first model: else each collection walks all of them
    again, 0.3 s. Only the first call does anything: a model that is frozen, in cycles, is never freed."""
    gc.collect()
    gc.freeze()


def release() -> None:
    """Hand freed memory back to the system: modules hold cycles, and glibc keeps what they free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
