"""Memory: how much is held, and how to hand it back between jobs of one process."""

from __future__ import annotations

import ctypes
import gc
import sys

import psutil
import torch


def held_gib() -> float:
    """What tensors hold of the device, where there is one; else what this process holds."""
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return held / 2**30


def release() -> None:
    """Hand freed memory back to the system: modules hold cycles, and glibc keeps what they free.

    What survives (libraries, caches) is set aside: else each collection would walk all of it, 0.3 s, again.
    """
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
