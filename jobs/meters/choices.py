"""How often the artifact finds the right one of several continuations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jobs import data
from jobs.data import Question
from jobs.measurement import likelihood
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject, run_meter
from jobs.models.tokenizers import Tokenizer
from jobs.runtimes import Runner


@dataclass(frozen=True)
class _Encoded:
    """Each choice as the tokens of `context` and then its own; all choices share the context's."""

    context: list[int]
    endings: list[list[int]]


def measure(subject: Subject) -> Measurement:
    """choice_accuracy: the choice of the highest log-likelihood given the context is the right one.
    choice_accuracy_norm: the same with the log-likelihood divided by the choice's UTF-8 bytes, so that
    short choices have no advantage. Errors are standard errors over the items."""
    if subject.materials.choices is None:
        raise ValueError("choice accuracy needs multiple-choice items; give the study data.choices")
    questions = data.choices(subject.materials.choices)
    questions = questions[: subject.items_of(len(questions))]

    def observe(start: int) -> list[Tensor]:
        found = [_right(subject, question) for question in questions[start:]]
        return [torch.tensor(one) for one in zip(*found, strict=True)]

    names = ("choice_accuracy", "choice_accuracy_norm")
    return run_meter(dict(zip(names, subject.observed(names, len(questions), observe), strict=True)))


def _right(subject: Subject, question: Question) -> tuple[bool, bool]:
    """Whether the likeliest choice is the right one, and whether the likeliest by its length is."""
    scores = likelihoods(subject.runner, subject.tokenizer, question)
    lengths = torch.tensor([len(choice.encode()) for choice in question.choices])
    plain, normalised = scores.argmax().item(), (scores / lengths).argmax().item()
    return plain == question.answer, normalised == question.answer


def likelihoods(runner: Runner, tokenizer: Tokenizer, question: Question) -> Float[Tensor, " choices"]:
    """The log-likelihood (nats) of each choice as the continuation of the context.

    Raises FloatingPointError where the model gives no finite ones.
    """
    encoded = _encode(tokenizer, question)
    return likelihood.of_endings(runner, encoded.context, encoded.endings)[0]


def _encode(tokenizer: Tokenizer, question: Question) -> _Encoded:
    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    context = tokens(question.context)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not context and start is not None:
        # A first token can only be predicted from something.
        return _Encoded([start], [tokens(choice) for choice in question.choices])
    # Tokenized together, since a word's tokens depend on what stands before it; a choice that changes
    # the context's own last token is tokenized alone.
    endings = []
    for choice in question.choices:
        whole = tokens(question.context + choice)
        kept = whole[: len(context)] == context and len(whole) > len(context)
        endings.append(whole[len(context) :] if kept else tokens(choice))
    return _Encoded(context, endings)


METER = Meter(
    metrics=("choice_accuracy", "choice_accuracy_norm"),
    tasks=("causal-lm",),
    measure=measure,
    reads="choices",
)
