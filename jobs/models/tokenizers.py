"""Load, identify and copy tokenizers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jobs.models.facts import remembered

if TYPE_CHECKING:
    import transformers  # its import takes a second

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"


def tokenizer_digest(folder: Path) -> str:
    """Return the digest of a folder's tokenizer; all artifacts of one original have the same."""
    total = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one model folder into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder. Never runs code from the folder."""
    import transformers

    tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def vocabulary_size(folder: Path) -> int:
    """Return the number of token ids of a folder's model."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def check_vocabulary(folder: Path) -> None:
    """Raise ValueError if the tokenizer of a folder has ids without a row in the model's embedding.

    More rows than ids are usual, since embeddings are padded.
    """

    def compute() -> int:
        try:
            return max(load_tokenizer(folder).get_vocab().values(), default=-1)
        except Exception as error:  # the readers of its many formats raise many types
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer in {folder} cannot be read: {reason}") from error

    highest_id = remembered("highest-id", [tokenizer_digest(folder), str(vocabulary_size(folder))], compute)
    rows = vocabulary_size(folder)
    if highest_id >= rows:
        raise ValueError(
            f"the tokenizer in {folder} makes ids up to {highest_id}, and the embedding has {rows} rows: "
            f"they belong to different models; give the model its own tokenizer"
        )
