"""Generate text with an exported model in its runtime, so that a person can try it."""

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
    """An exported model, loaded to generate text.

    Raises LookupError if no runtime of this machine runs its format, ValueError if the folder is not an export.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        format = formats.format_of(folder)
        self.runtime = runtimes.runtime_for(format)
        self._runner: Runner = runtimes.load(self.runtime).start(folder, threads)
        self._tokenizer: Tokenizer = tokenizers.load_tokenizer(folder)

    def reply(self, message: str, tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """Yield the model's answer in pieces as it is generated, at most `tokens` tokens. Calls share no history.

        The message is put into the model's chat template. A model without one continues the text. temperature 0
        always takes the likeliest token.
        """
        prompt = self._prompt(message)
        choose = most_likely if temperature == 0 else _sampler(temperature, seed)
        generated: list[int] = []
        shown = ""
        for token in generate(self._runner, prompt, tokens, self._tokenizer.eos_token_id, choose):
            generated.append(token)
            text = str(self._tokenizer.decode(generated, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # the last character is incomplete: its other bytes follow
                yield text[len(shown) :]
                shown = text

    def _prompt(self, message: str) -> Int[np.ndarray, "1 tokens"]:
        if self._tokenizer.chat_template is None:
            return np.array([self._tokenizer(message).input_ids])
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        return np.array([self._tokenizer(str(text), add_special_tokens=False).input_ids])


def _sampler(temperature: float, seed: int) -> Callable[[Float[np.ndarray, " vocabulary"]], int]:
    """Return a function that draws a token by its probability at this temperature."""
    generator = np.random.default_rng(seed)

    def draw(logits: Float[np.ndarray, " vocabulary"]) -> int:
        shares = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
        return int(generator.choice(len(shares), p=shares / shares.sum()))

    return draw
