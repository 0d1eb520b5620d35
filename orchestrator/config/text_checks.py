"""Check a study file as text and as YAML, before its values are read: size, depth, secrets, numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.problems import InvalidStudyError, Problem

MAX_BYTES = 2**20
"""The size of a study file, at most: 1 MiB. A long study has some kilobytes."""
MAX_DEPTH = 50
"""Nested levels, at most. Studies have six. The readers of YAML recurse and crash beyond some hundreds."""
_SECRET_NAME = re.compile(r"secret|token|passw|credential|private|api_?key|access_?key", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: Path) -> str:
    """Return the text of a study file. Raises InvalidStudyError if it is no text, too large or nested too deeply."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise InvalidStudyError(
                [f"{path}:1 got {size_bytes / 2**20:.1f} MiB, expected a study of at most 1 MiB"]
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a file that is not UTF-8 text"
        raise InvalidStudyError([f"{path}:1 got {reason}, expected a study file in YAML"]) from error
    _check_depth(path, text)
    return text


def value_problems(key: str, value: object) -> Iterator[Problem]:
    """Yield a problem for each number in a value that is not finite, and for each secret that it would read."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from value_problems(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from value_problems(key, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, f"got {value}, expected a finite number")
    elif isinstance(value, str):
        for name in _ENVIRONMENT.findall(value):
            if _SECRET_NAME.search(name):
                message = (
                    f"got the environment variable {name}, expected no secret: a study is stored, printed and logged. "
                    f"Set the variable on the machines that need it"
                )
                yield Problem(key, message)


def _check_depth(path: Path, text: str) -> None:
    """Raise InvalidStudyError if the YAML is nested too deeply. Other errors of syntax are reported by the reader."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                line = getattr(event.start_mark, "line", 0) + 1
                raise InvalidStudyError(
                    [f"{path}:{line} got more than {MAX_DEPTH} nested levels, expected a study"]
                )
    except (yaml.YAMLError, RecursionError) as error:
        if isinstance(error, RecursionError) or "nesting depth" in str(error):
            raise InvalidStudyError([f"{path}:1 got too many nested levels, expected a study"]) from error
