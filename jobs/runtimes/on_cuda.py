"""The runtime `cuda`: eager PyTorch in bf16 on the first GPU, with linears unpacked as in the runtime `torch`."""

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
        return "torch finds no GPU: choose another runtime, or install torch for CUDA on a machine with a GPU"
    return None


def start(folder: Path, threads: int) -> TorchRunner:
    """Load the artifact of this folder onto the GPU. Sets the number of threads of the process."""
    torch.set_num_threads(threads)
    # cuDNN's attention plans each new length again, and decoding has a new length at every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return TorchRunner(on_torch.load(folder), "cuda")
