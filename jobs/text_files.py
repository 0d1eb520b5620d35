"""Read documents from .txt and .jsonl files, folders of them, and Python modules. Problems name the file and line."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

SUFFIXES = (".txt", ".jsonl")
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Piece:
    """The unit that `part` counts: a record of a .jsonl, a paragraph or line of a .txt, a string of a Python module."""

    document: str
    """The document that the piece belongs to."""
    text: str
    separator: str = _PARAGRAPH
    """Joins the pieces of one document."""


def files_of(path: str) -> Sequence[Path]:
    """Return the files of a path, in the order of their names, without hidden ones.

    Raises FileNotFoundError if there are none, ValueError for a file that cannot contain text.
    """
    if path.startswith("package:"):
        return [_module_file(path.removeprefix("package:"))]
    root = Path(path).expanduser()
    if root.is_dir():
        files = [file for file in sorted(root.rglob("*")) if file.suffix in SUFFIXES]
        files = [file for file in files if not is_hidden(file.relative_to(root))]
        if not files:
            raise FileNotFoundError(f"the folder {path} holds neither .txt nor .jsonl files")
        return files
    if not root.is_file():
        raise FileNotFoundError(f"no file or folder {path}; give a .txt, a .jsonl or a folder of them")
    if root.suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot read text from {root.suffix or 'such a file'}; give .txt or .jsonl")
    return [root]


def documents(path: str, part: tuple[float, float], where: Mapping[str, str]) -> Iterator[list[Piece]]:
    """Yield the documents of a path as their pieces, within `part` of all pieces and with the fields `where`.

    Raises ValueError if there is no text at all.
    """
    pieces = [piece for file in files_of(path) for piece in pieces_of(file, where)]
    if not pieces:
        raise ValueError(
            f"{path} contains no text: all of its records are empty, or none has the fields of `where`"
        )
    start, stop = (round(share * len(pieces)) for share in part)
    for _, group in groupby(pieces[start:stop], key=lambda piece: piece.document):
        yield list(group)


def pieces_of(file: Path, where: Mapping[str, str]) -> Iterator[Piece]:
    """Yield the pieces of a file. Records whose text is blank are left out."""
    if file.suffix == ".py":
        for number, text in enumerate(_literals(file)):
            yield Piece(f"{file}:{number}", text)
    elif file.suffix == ".txt":
        yield from _paragraphs(file)
    else:
        for number, record in records_of(file):
            text = text_field(record, "text", f"{file}:{number}")
            if text.strip() and all(_equals(record.get(name), value) for name, value in where.items()):
                yield Piece(f"{file}:{number}", text)


def records_of(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the JSON objects of a .jsonl file with their line numbers. Empty lines are left out."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decoded(line, file, number)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{file}:{number} is no JSON: {error}") from error
            except RecursionError as error:
                raise ValueError(f"{file}:{number} is nested too deeply") from error
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: got {type(record).__name__}, expected a JSON object")
            yield number, record


def text_field(record: Mapping[str, object], name: str, location: str) -> str:
    """Return a text of a record. Raises ValueError with the location if it is none, or contains half a character."""
    text = record.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{location} {name}: got {text!r}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{location} {name}: got the lone surrogate {surrogate}, which is half a character; mend the file"
        ) from error
    return text


def _paragraphs(file: Path) -> Iterator[Piece]:
    """Yield the paragraphs of a .txt file, or its lines if no blank line divides it. They are one document: `part` can
    cut it, and no end-of-text token comes between them."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            _decoded(line, file, number)
        raise
    separator = _PARAGRAPH
    if separator not in text:
        separator = "\n"
    if not text.strip():
        return
    for paragraph in text.split(separator):
        yield Piece(str(file), paragraph, separator)


def _decoded(line: bytes, file: Path, number: int) -> str:
    """Return a line as text, the first one without a byte order mark. Raises ValueError with its number."""
    encoding = "utf-8"
    if number == 1:
        encoding = "utf-8-sig"
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at {error.start}"
        raise ValueError(f"{file}:{number} is not UTF-8 text ({byte}): convert the file to UTF-8") from error


def _equals(value: object, text: str) -> bool:
    """Whether a field of a record has the value that a study gives as text. Numbers and booleans count as written."""
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    if isinstance(value, int | float):
        return str(value) == text
    return value == text


def is_hidden(path: Path) -> bool:
    """Whether a relative path leads to a hidden file, or through a hidden folder."""
    return any(part.startswith(".") for part in path.parts)


def _module_file(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise FileNotFoundError(f"package:{module}: no such Python module with source code is installed")
    return Path(spec.origin)


def _literals(file: Path) -> Iterator[str]:
    """Yield the strings that a Python module assigns at its top level, alone or as values of a dict. Nothing is run."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
            continue
        nodes: list[ast.expr] = [statement.value]
        if isinstance(statement.value, ast.Dict):
            nodes = statement.value.values
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
