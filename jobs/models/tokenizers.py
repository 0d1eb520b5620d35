"""Load, identify and copy tokenizers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import cast

import transformers

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip

Tokenizer = transformers.PreTrainedTokenizerBase


def tokenizer_digest(folder: Path) -> str:
    """The digest of a folder's tokenizer: artifacts of one original share it."""
    total = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a model folder's tokenizer into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; it never runs code from the folder."""
    found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(Tokenizer, found)


def vocabulary(folder: Path) -> int:
    """How many token ids a model of this folder knows."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def check_vocabulary(folder: Path) -> None:
    """Refuse, with a ValueError, a tokenizer that makes ids that the model's embedding has no row for. More
    rows than ids are usual: embeddings are padded."""
    ids = tokenizer(folder).get_vocab().values()
    rows = vocabulary(folder)
    if ids and max(ids) >= rows:
        raise ValueError(
            f"the tokenizer in {folder} makes ids up to {max(ids)}, and the embedding has {rows} rows: "
            f"they belong to different models"
        )
