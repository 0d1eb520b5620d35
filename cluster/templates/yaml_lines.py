"""YAML documents with the line of each key, and problems located at keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""The path to a value: keys of mappings and numbers of list items."""

_MAX_KEYS = 100_000
"""The largest number of keys of a document: aliases can multiply them without limit."""


@dataclass(frozen=True)
class Problem:
    """A problem of the value at `key`."""

    key: Key
    message: str
    certain: bool = True
    """False if the file may be right: the problem is then a warning."""


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    data: Any
    lines: dict[Key, int]
    """The line of each key; keys of an alias have the lines of its anchor."""
    twice: tuple[Key, ...]
    """Keys that are given more than once; YAML uses the last value."""

    def line(self, key: Key) -> int:
        """Return the line of a key, or of the nearest parent that the file contains."""
        while key not in self.lines:
            key = key[:-1]
        return self.lines[key]


def documents(path: Path) -> list[Document]:
    """Read the documents of a file. ValueError, with the line, if it is no YAML; OSError if it can't be read."""
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    read = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node was true
            lines, twice = _lines_of(node, path)
            read.append(Document(loader.construct_document(node), lines, tuple(twice)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line} got {getattr(error, 'problem', error)}, expected YAML") from None
    finally:
        loader.dispose()
    return read


def notation(key: Key) -> str:
    """Return a key in the usual notation: available_node_types.gpu.max_workers, containers[0].image."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def _lines_of(node: yaml.Node, path: Path) -> tuple[dict[Key, int], list[Key]]:
    """Return the line of each key of a document, and the keys that are given more than once."""
    lines: dict[Key, int] = {(): node.start_mark.line + 1}
    twice: list[Key] = []
    for key, line in _keys(node, (), (), path):
        if len(lines) == _MAX_KEYS:
            raise ValueError(f"{path} got more than {_MAX_KEYS} keys: aliases multiply them")
        if key in lines and not any(key[:end] in twice for end in range(len(key))):
            twice.append(key)
        lines[key] = line
    return lines, twice


def _keys(node: yaml.Node, key: Key, parents: tuple[yaml.Node, ...], path: Path) -> Iterator[tuple[Key, int]]:
    """Return the keys in a node with their lines; keys of an alias have the lines of its anchor."""
    if any(node is parent for parent in parents):
        raise ValueError(f"{path}:{node.start_mark.line + 1} got an alias of a value that contains it")
    parts: list[tuple[str | int, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts += [(name.value, name.start_mark.line, value) for name, value in _pairs(node, path)]
    elif isinstance(node, yaml.SequenceNode):
        parts += [(number, value.start_mark.line, value) for number, value in enumerate(node.value)]
    for part, line, value in parts:
        yield (*key, part), line + 1
        yield from _keys(value, (*key, part), (*parents, node), path)


def _pairs(node: yaml.MappingNode, path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Return a mapping's keys and values, after those that are merged in (<<) and not overridden."""
    pairs: list[tuple[yaml.ScalarNode, yaml.Node]] = []
    merged: list[yaml.MappingNode] = []
    for name, value in node.value:
        if name.tag == "tag:yaml.org,2002:merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            merged += [source for source in sources if isinstance(source, yaml.MappingNode)]
        elif name.tag == "tag:yaml.org,2002:str":
            pairs.append((name, value))
        else:
            # YAML reads `on` as true, and 010 as a number.
            text = repr(name.value) if isinstance(name, yaml.ScalarNode) else "a structure"
            raise ValueError(
                f"{path}:{name.start_mark.line + 1} got {text} as a key, expected text: put it in quotes"
            )
    names = {name.value for name, _ in pairs}
    for source in merged:
        added = [(name, value) for name, value in _pairs(source, path) if name.value not in names]
        names |= {name.value for name, _ in added}
        pairs = added + pairs
    return pairs
