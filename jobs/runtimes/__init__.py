"""One file, one way to run an artifact: `on_NAME.py` is the runtime NAME of a study's target."""

from __future__ import annotations

import functools
import pkgutil
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from jaxtyping import Float, Int

from jobs.plugins import module_of

_PREFIX = "on_"


class Runner(Protocol):
    """A shipped model, ready to run. An encoder's outputs are its last hidden states, a classifier's its
    classes' logits. Tokens are int64, what is answered fp32: numpy's, so that the process of a runtime that needs no
    torch loads none, which would be most of its start and a part of its memory."""

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        """All outputs for these texts: the logits of every next token, [batch, tokens, vocabulary],
        those of the classes, [batch, classes], or all states, [batch, tokens, width]."""

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        """Start anew with these tokens; returns the logits of the next token (an encoder: all states)."""

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        """Go one token further, with all that came before in the KV cache; the next token's logits.
        Not for encoders."""


class Runtime(Protocol):
    """What a module `on_NAME.py` offers. LIBRARY: the distribution that does the work, whose version is told
    beside what was measured. FORMAT: the one that candidates are written in for it, a name of `jobs.formats`;
    READS: all that it can run."""

    LIBRARY: str
    FORMAT: str
    READS: tuple[str, ...]

    def missing(self) -> str | None:
        """What must be installed before this can run, with the command; None if nothing."""

    def start(self, folder: Path, threads: int) -> Runner:
        """Load the model of this folder, which is in FORMAT, to run it on so many threads."""


@functools.cache
def names() -> tuple[str, ...]:
    """Every runtime there is, read from the files of this folder."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.removeprefix(_PREFIX) for name in found if name.startswith(_PREFIX)))


def load(name: str) -> Runtime:
    """The runtime of `jobs/runtimes/on_NAME.py`; LookupError lists which there are."""
    return cast(Runtime, module_of("runtime", name, names(), f"{__name__}.{_PREFIX}{name}"))


def runtime_for(format: str) -> str:
    """The first installed runtime that runs a format; LookupError with what to install, or that there is none."""
    able = [name for name in names() if format in load(name).READS]
    lacking = [reason for name in able if (reason := load(name).missing()) is not None]
    for name in able:
        if load(name).missing() is None:
            return name
    raise LookupError(
        f"nothing here runs {format}: {'; '.join(lacking) or 'slimfront has no runtime for it'}"
    )
