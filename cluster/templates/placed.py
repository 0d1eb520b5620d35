"""YAML with places: what a file says, and on which line it says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""The way to a value: keys of mappings, numbers of items."""


@dataclass(frozen=True)
class Problem:
    """What is wrong at `key`. Where it can't be told for sure (`certain` is false) it is a warning."""

    key: Key
    message: str
    certain: bool = True


@dataclass(frozen=True)
class Document:
    """One document of a file. lines: of all keys that stand in it; those brought by an alias have none.
    twice: keys given more than once, of which YAML takes the last."""

    data: Any
    lines: dict[Key, int]
    twice: tuple[Key, ...]

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest key above it that stands in the file."""
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
            for key, line in _places(node, (), {id(node)}):
                if key in lines:
                    twice.append(key)
                lines[key] = line
            found.append(Document(loader.construct_document(node), lines, tuple(twice)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line} got {getattr(error, 'problem', error)}, expected YAML") from None
    finally:
        loader.dispose()
    return found


def shown(key: Key) -> str:
    """As a person writes it: available_node_types.gpu.max_workers, containers[0].image."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def _places(node: yaml.Node, key: Key, above: set[int]) -> Iterator[tuple[Key, int]]:
    # An alias is its anchor's node again: walked once, or a few lines could mean millions of keys.
    parts: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts += [(name.value, name, value) for name, value in node.value if name.value != "<<"]
    elif isinstance(node, yaml.SequenceNode):
        parts += [(number, value, value) for number, value in enumerate(node.value)]
    for part, place, value in parts:
        yield (*key, part), place.start_mark.line + 1
        if id(value) not in above:
            above.add(id(value))
            yield from _places(value, (*key, part), above)
