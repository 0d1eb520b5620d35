"""How well a classifier tells the labels of texts: how often it is right, and its F1."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs import data
from jobs.data import Labelled
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject, run_meter
from jobs.models import loading


@torch.inference_mode()
def measure(subject: Subject) -> Measurement:
    """accuracy: the share of the labelled texts whose label has the highest logit. f1: the mean over the classes of
    2 TP / (2 TP + FP + FN), of those that occur as a label or as an answer (macro F1). Standard errors are over texts.
    Each text runs alone, cut to what the model can read."""
    if subject.materials.labelled is None:
        raise ValueError("accuracy needs texts with labels; give the study data.labelled")
    texts = data.labelled(subject.materials.labelled)
    texts = texts[: subject.items_of(len(texts))]
    config: Any = loading.load_config(subject.original)
    longest = int(getattr(config, "max_position_embeddings", 512)) - 2  # RoBERTa keeps two places for itself
    right = torch.tensor([class_of(one, config) for one in texts])

    def observe(start: int) -> list[Tensor]:
        return [torch.tensor([_answer(subject, one, longest) for one in texts[start:]])]

    (said,) = subject.observed(("answers",), len(texts), observe)
    return run_meter({"accuracy": said == right, "f1": f1_items(said.long(), right)}, {"answers": said})


def _answer(subject: Subject, one: Labelled, longest: int) -> int:
    tokens = subject.tokenizer(one.text, truncation=True, max_length=longest, return_tensors="pt")
    logits = torch.from_numpy(subject.runner.answer(tokens.input_ids.numpy()))[0]
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError(f"the logits of {one.text[:40]!r} came out as {logits.tolist()}")
    return int(logits.argmax())


def f1_items(said: Int[Tensor, " texts"], right: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Macro F1, and by how much each text moves it (see `measured`).

    With means over the texts, a class has F = 2 mean(tp) / (mean(said) + mean(right)), of which the derivative by one
    text's share is (2 tp - F (said + right)) / (mean(said) + mean(right)).
    """
    classes = torch.unique(torch.cat([said, right]))
    told, true = (one.unsqueeze(1).eq(classes).double() for one in (said, right))
    both = told.mean(dim=0) + true.mean(dim=0)
    f1 = 2 * (told * true).mean(dim=0) / both
    return (f1 + (2 * told * true - f1 * (told + true)) / both).mean(dim=1)


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


METER = Meter(metrics=("accuracy", "f1"), tasks=("classification",), measure=measure, reads="labelled")
