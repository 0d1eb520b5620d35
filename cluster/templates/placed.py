"""YAML with places: what a file says, and on which line it says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""The way to a value: keys of mappings, numbers of items."""

_MOST_KEYS = 100_000


@dataclass(frozen=True)
class Problem:
    """What is wrong at `key`. Where it can't be told for sure (`certain` is false) it is a warning."""

    key: Key
    message: str
    certain: bool = True


@dataclass(frozen=True)
class Document:
    """One document of a file. lines: of all its keys; of those that an alias brings, where they stand in the file.
    twice: keys given more than once, of which YAML takes the last."""

    data: Any
    lines: dict[Key, int]
    twice: tuple[Key, ...]

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest key above it that is given."""
        while key not in self.lines:
            key = key[:-1]
        return self.lines[key]


def documents(path: Path) -> list[Document]:
    """The documents of a file. Raises ValueError where it is no YAML, with the line; OSError where it can't be read."""
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    found = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node has said so
            lines: dict[Key, int] = {(): node.start_mark.line + 1}
            twice: list[Key] = []
            for key, line in _places(node, (), (), path):
                if len(lines) == _MOST_KEYS:
                    raise ValueError(f"{path} got more than {_MOST_KEYS} keys: aliases multiply them")
                if key in lines and not any(key[:end] in twice for end in range(len(key))):
                    twice.append(key)
                lines[key] = line
            found.append(Document(loader.construct_document(node), lines, tuple(twice)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where} got {getattr(error, 'problem', error)}, expected YAML") from None
    finally:
        loader.dispose()
    return found


def shown(key: Key) -> str:
    """As a person writes it: available_node_types.gpu.max_workers, containers[0].image."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def _places(node: yaml.Node, key: Key, above: tuple[yaml.Node, ...], path: Path) -> Iterator[tuple[Key, int]]:
    """The keys in a node with their lines, those of an alias with the lines of what it stands for."""
    if any(node is one for one in above):
        raise ValueError(f"{path}:{node.start_mark.line + 1} got an alias in what it stands for")
    parts: list[tuple[str | int, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts += [(name.value, name.start_mark.line, value) for name, value in _pairs(node, path)]
    elif isinstance(node, yaml.SequenceNode):
        parts += [(number, value.start_mark.line, value) for number, value in enumerate(node.value)]
    for part, line, value in parts:
        yield (*key, part), line + 1
        yield from _places(value, (*key, part), (*above, node), path)


def _pairs(node: yaml.MappingNode, path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """A mapping's keys and values, after those that are merged in (<<) and not overridden."""
    own: list[tuple[yaml.ScalarNode, yaml.Node]] = []
    merged: list[yaml.MappingNode] = []
    for name, value in node.value:
        if name.tag == "tag:yaml.org,2002:merge":
            brought = value.value if isinstance(value, yaml.SequenceNode) else [value]
            merged += [one for one in brought if isinstance(one, yaml.MappingNode)]
        elif name.tag == "tag:yaml.org,2002:str":
            own.append((name, value))
        else:
            # YAML makes true of `on`, and a number of 010.
            given = repr(name.value) if isinstance(name, yaml.ScalarNode) else "a structure"
            said = f"got {given} as a key, expected text: put it in quotes"
            raise ValueError(f"{path}:{name.start_mark.line + 1} {said}")
    names = {name.value for name, _ in own}
    for one in merged:
        fresh = [(name, value) for name, value in _pairs(one, path) if name.value not in names]
        names |= {name.value for name, _ in fresh}
        own = fresh + own
    return own
