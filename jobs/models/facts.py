"""Small facts about models that are expensive to compute, remembered in the user's cache folder.

A fact follows from the contents of files and from the code that computes it. Its file is named by the digest of all of
these, so it never becomes wrong; a file that cannot be read or written is ignored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "tokenizers")
"""The libraries whose versions decide a fact."""


def remembered(kind: str, contents: Sequence[bytes | str], compute: Callable[[], Any]) -> Any:
    """Return a fact from the cache, or compute it and store it.

    kind: names the computation. contents: everything that decides the fact besides the code of this folder. The fact
    is plain JSON data. Errors of `compute` are raised and not remembered.
    """
    digest = hashlib.sha256(f"{kind} {_code_digest()}".encode())
    for part in contents:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    file = folder() / f"{kind}-{digest.hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    fact = compute()
    with contextlib.suppress(OSError):
        _write(file, json.dumps(fact))
    return fact


def folder() -> Path:
    """Return the folder of the facts. It may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "slimfront" / "facts"


@functools.cache
def _code_digest() -> str:
    """Return the digest of the code of this folder and of the versions of the libraries."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for library in _LIBRARIES:
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)
