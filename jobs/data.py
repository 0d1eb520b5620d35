"""Cut the texts of a study into windows of tokens, and read its multiple-choice and labelled items."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from jobs.materials import TextSource
from jobs.models import loading, tokenizers
from jobs.models.facts import remembered
from jobs.text_files import Piece, documents, files_of, records_of, text_field

_CHARACTERS_PER_TOKEN = 8
"""Characters that are tokenized at first for each token that is needed. Twice as many follow if they are too few."""
_SPARE_TOKENS = 64
"""Tokens at the end of a shortened text that are not used, since the next characters could change them."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice item: which of the choices continues the context."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """The index of the right choice."""


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: int | str
    """The index of the class, or its name in the model's config."""
    location: str = ""
    """The file and line of the item."""


@dataclass(frozen=True)
class _Reading:
    """The key of cached windows. Two are equal if their windows are equal, wherever the files are."""

    data: str
    tokenizer: str
    source: TextSource = field(compare=False)
    folder: Path = field(compare=False)


def windows_for(source: TextSource, model_folder: Path) -> Int[Tensor, "samples tokens"]:
    """Return `windows` by the tokenizer of a model folder, cached in this process.

    The tensor is shared and must not be modified.
    """
    return _read(_Reading(digest(source), tokenizers.tokenizer_digest(model_folder), source, model_folder))


def check_windows(source: TextSource, model_folder: Path) -> None:
    """Raise ValueError if a source has too little text for its windows by the tokenizer of a model folder.

    The answer for the same text, tokenizer and options is remembered.
    """

    def count() -> int:
        return len(windows_for(source, model_folder))

    remembered("windows", [digest(source), tokenizers.tokenizer_digest(model_folder)], count)


def check_positions(tokens: int, model_folder: Path) -> None:
    """Raise ValueError if a model cannot read this many tokens at once."""
    limit = loading.max_positions(model_folder)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"windows of {tokens} tokens, expected at most {limit}: the model's max_position_embeddings"
        )


def windows(source: TextSource, tokenizer: tokenizers.Tokenizer) -> Int[Tensor, "samples tokens"]:
    """Return the documents of a source in a row, an end-of-text token between two, cut into windows.

    For an encoder's tokenizer each window is framed as the tokenizer frames a text ([CLS] … [SEP]), and there is
    nothing between documents. Raises ValueError if the text is too short.
    """
    frame = tokenizer("").input_ids
    is_encoder = tokenizer.cls_token_id is not None and tokenizer.cls_token_id in frame
    length = source.tokens
    separator: list[int] = []
    if is_encoder:
        length -= len(frame)
    elif tokenizer.eos_token_id is not None:
        separator = [tokenizer.eos_token_id]
    if length < 1:
        raise ValueError(f"windows of {source.tokens} tokens leave no room for text; ask for more tokens")
    needed = source.samples * length
    row: list[int] = []
    for pieces in documents(source.path, source.part, source.where):
        row += _first_tokens(pieces, needed - len(row), tokenizer) + separator
        if len(row) >= needed:
            break
    if len(row) < needed:
        raise ValueError(
            f"{source.path} holds {len(row)} tokens, {source.samples} samples of {source.tokens} tokens need "
            f"{needed}: ask for at most {len(row) // length} samples, or give more text{_narrowed(source)}"
        )
    cut = torch.tensor(row[:needed]).view(source.samples, length)
    if not is_encoder:
        return cut
    start_tokens = frame.index(tokenizer.cls_token_id) + 1
    start = torch.tensor(frame[:start_tokens]).expand(source.samples, -1)
    end = torch.tensor(frame[start_tokens:]).expand(source.samples, -1)
    return torch.cat([start, cut, end], dim=1)


def _first_tokens(pieces: Sequence[Piece], needed: int, tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Return the tokens of a document, or at least the first `needed` of them.

    A long document is not tokenized to its end: its first paragraphs have the same tokens as within the document.
    """
    characters = needed * _CHARACTERS_PER_TOKEN
    while True:
        count, total = 0, 0
        while count < len(pieces) and total <= characters:
            total += len(pieces[count].text)
            count += 1
        text = pieces[0].separator.join(piece.text for piece in pieces[:count])
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if count == len(pieces) or len(tokens) >= needed + _SPARE_TOKENS:
            return tokens
        characters *= 2


def check(source: TextSource) -> None:
    """Raise FileNotFoundError or ValueError for a source that cannot be read. The text itself is not read."""
    low, high = source.part
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"part={list(source.part)} must be a rising pair within [0, 1], such as [0.0, 0.8]")
    for name in ("samples", "tokens"):
        if getattr(source, name) < 1:
            raise ValueError(f"{name}={getattr(source, name)} must be at least 1")
    files = files_of(source.path)
    odd = next((file for file in files if file.suffix != ".jsonl"), None)
    if source.where and odd is not None:
        raise ValueError(f"where filters the fields of .jsonl documents, and {odd} has none")


def digest(source: TextSource) -> str:
    """Return the digest of everything that decides the windows except the tokenizer: file contents and options."""
    total = hashlib.sha256()
    for file_digest in _file_digests(source):
        total.update(file_digest)
    options = {name: value for name, value in dataclasses.asdict(source).items() if name != "path"}
    total.update(json.dumps(options, sort_keys=True).encode())
    return total.hexdigest()


def overlap(source: TextSource, reference: TextSource) -> float:
    """Return the share of a source, from 0 to 1, that a reference contains too, by the contents of their files."""
    if dict(source.where) != dict(reference.where):
        return 0.0
    digests, reference_digests = _file_digests(source), _file_digests(reference)
    low, high = source.part
    if digests == reference_digests:
        reference_low, reference_high = reference.part
        return max(0.0, min(high, reference_high) - max(low, reference_low)) / (high - low)
    # Parts of different sets of files cannot be compared; whole sources can.
    if tuple(reference.part) != (0.0, 1.0):
        return 0.0
    return sum(digest in reference_digests for digest in digests) / len(digests)


def _file_digests(source: TextSource) -> list[bytes]:
    return [_file_digest(file) for file in files_of(source.path)]


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def choices(path: str | Path) -> list[Question]:
    """Return the items of a .jsonl file of multiple-choice questions. Raises ValueError with the line of a problem."""
    questions = []
    for number, record in records_of(Path(path)):
        context, options, answer = (record.get(name) for name in ("context", "choices", "answer"))
        where = f"{path}:{number}"
        if not isinstance(context, str):
            raise ValueError(f"{where} context: got {context!r}, expected a string")
        if (
            not isinstance(options, list)
            or len(options) < 2
            or not all(isinstance(option, str) and option for option in options)
        ):
            raise ValueError(f"{where} choices: got {options!r}, expected at least two non-empty strings")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
            raise ValueError(f"{where} answer: got {answer!r}, expected an index below {len(options)}")
        questions.append(Question(context, tuple(options), answer))
    if not questions:
        raise ValueError(f"{path} holds no items; expected one JSON object a line: context, choices, answer")
    return questions


def labelled(path: str | Path) -> list[Labelled]:
    """Return the texts of a .jsonl file with their labels. Raises ValueError with the line of a wrong one."""
    texts = []
    for number, record in records_of(Path(path)):
        text, label = text_field(record, "text", f"{path}:{number}"), record.get("label")
        if not isinstance(label, (int, str)) or isinstance(label, bool):
            raise ValueError(f"{path}:{number} label: got {label!r}, expected an index or a name")
        if "text_pair" in record:
            raise ValueError(f"{path}:{number} text_pair: pairs of texts are not supported")
        texts.append(Labelled(text, label, f"{path}:{number}"))
    if not texts:
        raise ValueError(f"{path} holds no texts; expected one JSON object a line: text, label")
    return texts


@lru_cache(maxsize=8)
def _read(reading: _Reading) -> Int[Tensor, "samples tokens"]:
    return windows(reading.source, tokenizers.load_tokenizer(reading.folder))


def _narrowed(source: TextSource) -> str:
    """Return a hint at the options that restrict a source; empty if there are none."""
    options = []
    if source.part != (0.0, 1.0):
        options.append(f"part={list(source.part)}")
    if source.where:
        options.append(f"where={dict(source.where)}")
    if not options:
        return ""
    return f" (only {' and '.join(options)} of it is read)"
