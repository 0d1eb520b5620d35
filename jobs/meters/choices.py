"""Multiple choice: the share of questions whose right ending is the most likely one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jobs import data
from jobs.data import Question
from jobs.measurement import likelihood
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel, run_meter
from jobs.models.tokenizers import Tokenizer
from jobs.runtimes import Runner


@dataclass(frozen=True)
class _Encoded:
    """The token ids of a question: those of the context, which all choices share, and those of each ending."""

    context: list[int]
    endings: list[list[int]]


def measure(subject: ShippedModel) -> Measurement:
    """Measure choice_accuracy and choice_accuracy_norm.

    The answer is the choice with the highest log-likelihood after the context. `_norm` divides the log-likelihood by
    the UTF-8 bytes of the choice, so that short choices have no advantage. Errors are standard errors over questions.
    """
    if subject.materials.choices is None:
        raise ValueError("choice accuracy needs multiple-choice items; give the study data.choices")
    questions = data.choices(subject.materials.choices)
    questions = questions[: subject.items_of(len(questions))]

    def observe(start: int) -> list[Tensor]:
        answers = [_is_right(subject, question) for question in questions[start:]]
        return [torch.tensor(values) for values in zip(*answers, strict=True)]

    names = ("choice_accuracy", "choice_accuracy_norm")
    return run_meter(dict(zip(names, subject.observed(names, len(questions), observe), strict=True)))


def _is_right(subject: ShippedModel, question: Question) -> tuple[bool, bool]:
    """Return whether the most likely choice is right, and whether the most likely one per byte is."""
    scores = likelihoods(subject.runner, subject.tokenizer, question)
    lengths = torch.tensor([len(choice.encode()) for choice in question.choices])
    plain, normalised = scores.argmax().item(), (scores / lengths).argmax().item()
    return plain == question.answer, normalised == question.answer


def likelihoods(runner: Runner, tokenizer: Tokenizer, question: Question) -> Float[Tensor, " choices"]:
    """Return the log-likelihood (nats) of each choice as the continuation of the context.

    Raises FloatingPointError if one is not finite.
    """
    encoded = _encode(tokenizer, question)
    return likelihood.log_likelihoods(runner, encoded.context, encoded.endings)[0]


def _encode(tokenizer: Tokenizer, question: Question) -> _Encoded:
    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    context = tokens(question.context)
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if not context and start is not None:
        # The first token of an ending needs a token before it.
        return _Encoded([start], [tokens(choice) for choice in question.choices])
    # Context and choice are tokenized together, since the tokens of a word depend on the text before it. A choice that
    # changes the last token of the context is tokenized alone.
    endings = []
    for choice in question.choices:
        whole = tokens(question.context + choice)
        if whole[: len(context)] == context and len(whole) > len(context):
            endings.append(whole[len(context) :])
        else:
            endings.append(tokens(choice))
    return _Encoded(context, endings)


METER = Meter(
    metrics=("choice_accuracy", "choice_accuracy_norm"),
    tasks=("causal-lm",),
    measure=measure,
    reads="choices",
)
