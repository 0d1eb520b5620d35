"""Ranks: the processes that train one model together, and what they tell each other. One where nothing says otherwise.

A process learns which rank it is from the environment that torch.distributed reads.
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
    """Which of how many this process is. What ranks tell each other needs `join` first, and all to take part."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, int]]:
        """Of each round of as many batches as there are ranks this rank's own, and how many the round has. Of a
        round with too few, those who are left over get the first, so that all compute as often."""
        for start in range(0, len(batches), self.count):
            round_ = batches[start : start + self.count]
            yield round_[self.rank if self.rank < len(round_) else 0], len(round_)

    def all_gather(self, value: float) -> list[float]:
        """Each rank's value, in their order."""
        if self.count == 1:
            return [value]
        own = torch.tensor([value], dtype=torch.float64, device=_device())
        every = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(every, own)
        return [float(one) for one in every]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return any(self.all_gather(float(flag)))

    def broadcast_object(self, given: T) -> T:
        """What the first rank gives."""
        if self.count == 1:
            return given
        box = [given]
        distributed.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give these tensors, in place, the values that the first rank's have."""
        for tensor in tensors if self.count > 1 else ():
            values = tensor.detach().reshape(-1).contiguous()
            distributed.broadcast(values.view(torch.uint8), src=0)
            tensor.copy_(values.view(tensor.shape))


def here() -> Ranks:
    """Which rank this process is."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def take_device() -> None:
    """Compute on a GPU of one's own, where ranks see several."""
    if here().count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def join() -> Ranks:
    """Meet the other ranks, over gloo or, with GPUs, nccl. The group is kept for as long as the process lives, since
    DeepSpeed keeps references to it; that of a single rank lives inside of the process, without a port."""
    ranks = here()
    if not distributed.is_initialized():
        gpu = torch.cuda.is_available()
        store = distributed.HashStore() if ranks.count == 1 else None  # type: ignore[attr-defined]  # not told to mypy
        distributed.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            init_method=None if store else "env://",
            rank=ranks.rank,
            world_size=ranks.count,
            # Not told, NCCL warns at each barrier that it guesses.
            device_id=_device() if gpu else None,
        )
    return ranks


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
