"""Data: reads the texts and the multiple-choice items of a study, and cuts text into windows of tokens."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from jobs.materials import TextSource
from jobs.models import tokenizers
from jobs.models.facts import remembered


@dataclass(frozen=True)
class Question:
    """One multiple-choice item: which of `choices` continues `context`; `answer` is its index."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Labelled:
    """A text and its class: an index, or a name that the model's config knows."""

    text: str
    label: int | str


@dataclass(frozen=True)
class _Piece:
    """What `part` counts: a record of a .jsonl, a paragraph of a .txt, a string of a Python module."""

    document: str
    text: str


@dataclass(frozen=True)
class _Reading:
    """Equal where the windows are equal, wherever the files lie."""

    data: str
    tokenizer: str
    source: TextSource = field(compare=False)
    folder: Path = field(compare=False)


def windows_for(source: TextSource, model_folder: Path) -> Int[Tensor, "samples tokens"]:
    """`windows` by the tokenizer of a model folder, remembered for as long as the process lives.

    The tensor is shared: it must not be changed.
    """
    return _read(_Reading(digest(source), tokenizers.tokenizer_digest(model_folder), source, model_folder))


def check_windows(source: TextSource, model_folder: Path) -> None:
    """Raise ValueError if a source has too little text for its windows by the tokenizer of a model folder.

    The answer for the same text, tokenizer and options is remembered.
    """

    def count() -> int:
        return len(windows_for(source, model_folder))

    remembered("windows", [digest(source), tokenizers.tokenizer_digest(model_folder)], count)


def windows(source: TextSource, tokenizer: tokenizers.Tokenizer) -> Int[Tensor, "samples tokens"]:
    """The source's documents in a row, an end-of-text token between two, cut into windows.

    For an encoder's tokenizer each window is framed as the tokenizer frames a text ([CLS] … [SEP]), and
    nothing stands between documents. Raises ValueError where the text is too short.
    """
    frame = tokenizer("").input_ids
    encoder = tokenizer.cls_token_id is not None and tokenizer.cls_token_id in frame
    length = source.tokens - len(frame) if encoder else source.tokens
    if length < 1:
        raise ValueError(f"windows of {source.tokens} tokens leave no room for text; ask for more tokens")
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and not encoder else []
    needed = source.samples * length
    row: list[int] = []
    for text in _documents(source):
        row += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + separator
        if len(row) >= needed:
            break
    if len(row) < needed:
        raise ValueError(
            f"{source.path} holds {len(row)} tokens, {source.samples} samples of {source.tokens} tokens need "
            f"{needed}: ask for at most {len(row) // length} samples, or give more text{_narrowed(source)}"
        )
    cut = torch.tensor(row[:needed]).view(source.samples, length)
    if not encoder:
        return cut
    before = frame.index(tokenizer.cls_token_id) + 1
    start = torch.tensor(frame[:before]).expand(source.samples, -1)
    end = torch.tensor(frame[before:]).expand(source.samples, -1)
    return torch.cat([start, cut, end], dim=1)


def check(source: TextSource) -> None:
    """Refuse, without reading the text, a source that cannot be read; FileNotFoundError or ValueError."""
    low, high = source.part
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"part={list(source.part)} must be a rising pair within [0, 1], such as [0.0, 0.8]")
    for name in ("samples", "tokens"):
        if getattr(source, name) < 1:
            raise ValueError(f"{name}={getattr(source, name)} must be at least 1")
    files = _files(source.path)
    odd = next((file for file in files if file.suffix != ".jsonl"), None)
    if source.where and odd is not None:
        raise ValueError(f"where filters the fields of .jsonl documents, and {odd} has none")


def digest(source: TextSource) -> str:
    """The digest of everything that decides the windows but the tokenizer: the files' bytes and the options."""
    total = hashlib.sha256()
    for file in _files(source.path):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    options = {name: value for name, value in dataclasses.asdict(source).items() if name != "path"}
    total.update(json.dumps(options, sort_keys=True).encode())
    return total.hexdigest()


def choices(path: str | Path) -> list[Question]:
    """The items of a .jsonl file of multiple-choice questions; ValueError names the line that is wrong."""
    questions = []
    for number, record in _records(Path(path)):
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
    """The texts of a .jsonl file with their labels; ValueError names the line that is wrong."""
    texts = []
    for number, record in _records(Path(path)):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number} text: got {text!r}, expected a string")
        if not isinstance(label, (int, str)) or isinstance(label, bool):
            raise ValueError(f"{path}:{number} label: got {label!r}, expected an index or a name")
        texts.append(Labelled(text, label))
    if not texts:
        raise ValueError(f"{path} holds no texts; expected one JSON object a line: text, label")
    return texts


@lru_cache(maxsize=8)
def _read(reading: _Reading) -> Int[Tensor, "samples tokens"]:
    return windows(reading.source, tokenizers.load_tokenizer(reading.folder))


def _narrowed(source: TextSource) -> str:
    """How to get more text out of a source of which only a share is read."""
    options = [f"part={list(source.part)}"] if source.part != (0.0, 1.0) else []
    options += [f"where={dict(source.where)}"] if source.where else []
    return f" (only {' and '.join(options)} of it is read)" if options else ""


def _documents(source: TextSource) -> Iterator[str]:
    """The documents, in order, that `part` and `where` leave."""
    pieces = [piece for file in _files(source.path) for piece in _pieces(file, source)]
    start, stop = (round(share * len(pieces)) for share in source.part)
    for _, found in groupby(pieces[start:stop], key=lambda piece: piece.document):
        yield "\n\n".join(piece.text for piece in found)


def _files(path: str) -> Sequence[Path]:
    """The files that a source's path means, in order of their names."""
    if path.startswith("package:"):
        return [_module_file(path.removeprefix("package:"))]
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise FileNotFoundError(f"the folder {path} holds neither .txt nor .jsonl files")
        return files
    if not place.is_file():
        raise FileNotFoundError(f"no file or folder {path}; give a .txt, a .jsonl or a folder of them")
    if place.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: cannot read text from {place.suffix or 'such a file'}; give .txt or .jsonl"
        )
    return [place]


def _module_file(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise FileNotFoundError(f"package:{module}: no such Python module with source code is installed")
    return Path(spec.origin)


def _pieces(file: Path, source: TextSource) -> Iterator[_Piece]:
    if file.suffix == ".py":
        for number, text in enumerate(_literals(file)):
            yield _Piece(f"{file}:{number}", text)
    elif file.suffix == ".txt":
        # The paragraphs of one file stay one document: `part` can cut it, no end-of-text comes between.
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            yield _Piece(str(file), paragraph)
    else:
        for number, record in _records(file):
            written = record.get("text")
            if not isinstance(written, str):
                raise ValueError(f"{file}:{number} text: got {written!r}, expected a string")
            if all(record.get(name) == value for name, value in source.where.items()):
                yield _Piece(f"{file}:{number}", written)


def _records(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The JSON objects of a .jsonl file with their line numbers; empty lines are passed over."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: got {type(record).__name__}, expected a JSON object")
            yield number, record


def _literals(file: Path) -> Iterator[str]:
    """The strings that a Python module's top level assigns, alone or as a dict's values. Nothing is run."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
            continue
        value = statement.value
        nodes = value.values if isinstance(value, ast.Dict) else [value]
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
