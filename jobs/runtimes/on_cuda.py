"""The runtime `cuda`: eager PyTorch in bf16 on the first GPU. What `torch` says of packed linears holds here too."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.runtimes import on_torch
from jobs.runtimes.on_torch import TorchRunner

LIBRARY = on_torch.LIBRARY
FORMAT = on_torch.FORMAT
READS = on_torch.READS


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU: take another runtime, or install torch for CUDA on a machine that has one"
    return None


def start(folder: Path, threads: int) -> TorchRunner:
    """Load the artifact of this folder onto the GPU. Threads are the whole process's."""
    torch.set_num_threads(threads)
    # cuDNN's attention makes a plan for each new length, and decoding has a new one at every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return TorchRunner(on_torch.load(folder), "cuda")
