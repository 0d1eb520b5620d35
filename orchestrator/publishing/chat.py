"""Chat: text from an export in its runtime, for a person to see what they got."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jobs import formats, runtimes
from jobs.measurement.generation import generate, most_likely
from jobs.models import tokenizers
from jobs.models.tokenizers import Tokenizer
from jobs.runtimes import Runner


class Chat:
    """An export, loaded to write text on so many threads.

    Raises LookupError where nothing here runs its form, ValueError where it is no export.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        format = formats.format_of(folder)
        self.runtime = runtimes.runtime_for(format)
        self._runner: Runner = runtimes.load(self.runtime).start(folder, threads)
        self._words: Tokenizer = tokenizers.load_tokenizer(folder)

    def reply(self, said: str, tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """What the model writes after `said`, piece by piece, at most so many tokens. Each call starts anew.

        A model with a chat template is spoken to in it; any other goes on with the text. temperature 0 always
        takes the likeliest token.
        """
        prompt = self._prompt(said)
        choose = most_likely if temperature == 0 else _drawing(temperature, seed)
        written: list[int] = []
        shown = ""
        for token in generate(self._runner, prompt, tokens, self._words.eos_token_id, choose):
            written.append(token)
            text = str(self._words.decode(written, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # half of a character, whose other bytes are still to come
                yield text[len(shown) :]
                shown = text

    def _prompt(self, said: str) -> Int[np.ndarray, "1 tokens"]:
        if self._words.chat_template is None:
            return np.array([self._words(said).input_ids])
        framed = self._words.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False
        )
        return np.array([self._words(str(framed), add_special_tokens=False).input_ids])


def _drawing(temperature: float, seed: int) -> Callable[[Float[np.ndarray, " vocabulary"]], int]:
    """Draws each token by its probability at this temperature."""
    generator = np.random.default_rng(seed)

    def drawn(logits: Float[np.ndarray, " vocabulary"]) -> int:
        shares = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
        return int(generator.choice(len(shares), p=shares / shares.sum()))

    return drawn
