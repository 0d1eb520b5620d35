"""Ranks: the processes that train one model together, and their collective operations. Without a launcher there is one.

A process reads its rank from the environment variables of torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process. Collective operations need `join` first, and every rank must take part."""

    rank: int = 0
    count: int = 1
    """The number of ranks."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, int]]:
        """Yield this rank's batch of each round, and the number of batches in the round.

        A round has one batch per rank. In a last round with fewer batches, the remaining ranks repeat the first batch,
        so that all ranks compute equally often.
        """
        for start in range(0, len(batches), self.count):
            round_batches = batches[start : start + self.count]
            index = 0
            if self.rank < len(round_batches):
                index = self.rank
            yield round_batches[index], len(round_batches)

    def all_gather(self, value: float) -> list[float]:
        """Return the values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        local = torch.tensor([value], dtype=torch.float64, device=_device())
        gathered = [torch.empty_like(local) for _ in range(self.count)]
        distributed.all_gather(gathered, local)
        return [float(tensor) for tensor in gathered]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.all_gather(float(flag)))

    def broadcast_object(self, value: T) -> T:
        """Return the first rank's value."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=_device())
        return values[0]

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with the values of the first rank."""
        if self.count == 1:
            return
        for tensor in tensors:
            values = tensor.detach().reshape(-1).contiguous()
            distributed.broadcast(values.view(torch.uint8), src=0)
            tensor.copy_(values.view(tensor.shape))


def here() -> Ranks:
    """Return the rank of this process."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def take_device() -> None:
    """Select a GPU for this rank if several ranks see several GPUs."""
    if here().count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def join() -> Ranks:
    """Connect to the other ranks over gloo or, with GPUs, nccl.

    The process group exists until the process ends, since DeepSpeed keeps references to it. The group of a single rank
    needs no port.
    """
    ranks = here()
    if distributed.is_initialized():
        return ranks
    store = None  # the ranks meet at the address in the environment
    if ranks.count == 1:
        store = distributed.HashStore()  # type: ignore[attr-defined]  # lacks types
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "nccl", _device()  # without a device NCCL warns at each barrier that it guesses one
    distributed.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.count,
        device_id=device,
    )
    return ranks


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
