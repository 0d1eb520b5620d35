"""Generate text with a shipped model in its runtime, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from jobs.runtimes import Runner


def most_likely(logits: Float[np.ndarray, " vocabulary"]) -> int:
    """Return the most likely token."""
    return int(logits.argmax())


def generate(
    runner: Runner,
    prompt: Int[np.ndarray, "1 tokens"],
    max_tokens: int,
    end: int | None,
    choose: Callable[[Float[np.ndarray, " vocabulary"]], int] = most_likely,
) -> Iterator[int]:
    """Yield the tokens that `choose` selects from the logits: at most `max_tokens`, and up to the token `end`."""
    logits = runner.prefill(prompt)
    for remaining_tokens in reversed(range(max_tokens)):
        token = choose(logits[0, -1])
        if token == end:
            return
        yield token
        if remaining_tokens:
            logits = runner.decode(np.array([[token]]))
