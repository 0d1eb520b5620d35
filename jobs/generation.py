"""Generation: text that a shipped model writes in its runtime, one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.runtimes import Runner


def likeliest(logits: Float[Tensor, " vocabulary"]) -> int:
    return int(logits.argmax().item())


def continued(
    runner: Runner,
    prompt: Int[Tensor, "1 tokens"],
    most: int,
    end: int | None,
    choose: Callable[[Float[Tensor, " vocabulary"]], int] = likeliest,
) -> Iterator[int]:
    """The tokens that `choose` takes from the next one's logits, at most so many; `end` is where the text ends."""
    logits = runner.prefill(prompt)
    for left in reversed(range(most)):
        token = choose(logits[0, -1].float())
        if token == end:
            return
        yield token
        if left:
            logits = runner.decode(torch.tensor([[token]]))
