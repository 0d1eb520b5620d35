"""Accuracy and macro F1 of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs import data
from jobs.data import Labelled
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel, run_meter
from jobs.models import loading


@torch.inference_mode()
def measure(subject: ShippedModel) -> Measurement:
    """Measure accuracy and f1 on the labelled texts.

    accuracy: the share of texts whose label has the highest logit. f1: the mean of 2 TP / (2 TP + FP + FN) over the
    classes that occur as a label or as an answer (macro F1). Errors are standard errors over texts. Each text runs
    alone, truncated to the model's positions.
    """
    if subject.materials.labelled is None:
        raise ValueError("accuracy needs texts with labels; give the study data.labelled")
    texts = data.labelled(subject.materials.labelled)
    texts = texts[: subject.items_of(len(texts))]
    config: Any = loading.load_config(subject.original)
    longest = int(getattr(config, "max_position_embeddings", 512)) - 2  # RoBERTa reserves two positions
    labels = torch.tensor([class_of(text, config) for text in texts])

    def observe(start: int) -> list[Tensor]:
        return [torch.tensor([_answer(subject, text, longest) for text in texts[start:]])]

    (answers,) = subject.observed(("answers",), len(texts), observe)
    items = {"accuracy": answers == labels, "f1": f1_items(answers.long(), labels)}
    return run_meter(items, {"answers": answers})


def _answer(subject: ShippedModel, item: Labelled, longest: int) -> int:
    tokens = subject.tokenizer(item.text, truncation=True, max_length=longest, return_tensors="pt")
    logits = torch.from_numpy(subject.runner.answer(tokens.input_ids.numpy()))[0]
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError(f"the logits of {item.text[:40]!r} came out as {logits.tolist()}")
    return int(logits.argmax())


def f1_items(answers: Int[Tensor, " texts"], labels: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Return macro F1 plus the first-order effect of each text (see `run_meter`).

    With means over texts, the F1 of a class is F = 2 mean(tp) / (mean(answer) + mean(label)). Its derivative by the
    share of one text is (2 tp - F (answer + label)) / (mean(answer) + mean(label)).
    """
    classes = torch.unique(torch.cat([answers, labels]))
    is_answer = answers.unsqueeze(1).eq(classes).double()
    is_label = labels.unsqueeze(1).eq(classes).double()
    total = is_answer.mean(dim=0) + is_label.mean(dim=0)
    f1 = 2 * (is_answer * is_label).mean(dim=0) / total
    return (f1 + (2 * is_answer * is_label - f1 * (is_answer + is_label)) / total).mean(dim=1)


def class_of(text: Labelled, config: Any) -> int:
    """Return the class index of a label: an integer, or a name of the model's config."""
    label2id: dict[str, int] = config.label2id
    index = label2id.get(text.label) if isinstance(text.label, str) else text.label
    if index is None or not 0 <= index < config.num_labels:
        raise ValueError(
            f"{text.location} label: got {text.label!r}, expected {', '.join(label2id)} or 0 to {config.num_labels - 1}"
        )
    return index


def check_labels(path: str, folder: Path) -> None:
    """Raise ValueError with the line of the first label that the model of a folder does not have."""
    config = loading.load_config(folder)
    for text in data.labelled(path):
        class_of(text, config)


METER = Meter(metrics=("accuracy", "f1"), tasks=("classification",), measure=measure, reads="labelled")
