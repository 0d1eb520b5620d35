"""Generation: text that a shipped model writes in its runtime, one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from jobs.runtimes import Runner


def likeliest(logits: Float[np.ndarray, " vocabulary"]) -> int:
    return int(logits.argmax())


def continued(
    runner: Runner,
    prompt: Int[np.ndarray, "1 tokens"],
    most: int,
    end: int | None,
    choose: Callable[[Float[np.ndarray, " vocabulary"]], int] = likeliest,
) -> Iterator[int]:
    """The tokens that `choose` takes from the next one's logits, at most so many; `end` is where the text ends."""
    logits = runner.prefill(prompt)
    for left in reversed(range(most)):
        token = choose(logits[0, -1])
        if token == end:
            return
        yield token
        if left:
            logits = runner.decode(np.array([[token]]))
