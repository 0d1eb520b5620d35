"""How often a classifier gives a text its right label."""

from __future__ import annotations

import math
from typing import Any

import torch

from jobs import data, models
from jobs.data import Labelled
from jobs.job import Measurement
from jobs.meter import Meter, Subject, mean_and_error


@torch.inference_mode()
def measure(subject: Subject) -> Measurement:
    """accuracy: the share of the labelled texts whose label has the highest logit, with its standard error
    over texts. Each text runs alone, cut to what the model can read."""
    if subject.materials.labelled is None:
        raise ValueError("accuracy needs texts with labels; give the study data.labelled")
    texts = data.labelled(subject.materials.labelled)
    texts = texts[: max(1, math.ceil(subject.fidelity * len(texts)))]
    config: Any = models.config(subject.original)
    longest = int(getattr(config, "max_position_embeddings", 512)) - 2  # RoBERTa keeps two places for itself
    hits = []
    for one in texts:
        tokens = subject.tokenizer(one.text, truncation=True, max_length=longest, return_tensors="pt")
        logits = subject.runner.answer(tokens.input_ids)[0]
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError(f"the logits of {one.text[:40]!r} came out as {logits.tolist()}")
        hits.append(logits.argmax().item() == class_of(one, config))
    accuracy, error = mean_and_error(torch.tensor(hits).double())
    return Measurement({"accuracy": accuracy}, {"accuracy": error})


def class_of(text: Labelled, config: Any) -> int:
    """The index of a text's label: a number is one, a name is looked up in the model's config."""
    known: dict[str, int] = config.label2id
    index = known.get(text.label) if isinstance(text.label, str) else text.label
    if index is None or not 0 <= index < config.num_labels:
        raise ValueError(
            f"label {text.label!r} of {text.text[:40]!r} is none of the model's: "
            f"{', '.join(known)} or 0 to {config.num_labels - 1}"
        )
    return index


METER = Meter(metrics=("accuracy",), tasks=("classification",), measure=measure, reads="labelled")
