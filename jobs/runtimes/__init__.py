"""Runtimes, one file each: `on_NAME.py` runs exported models for the target runtime NAME of a study."""

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
    """A loaded model, ready to run.

    Tokens are int64, outputs fp32. Arrays are numpy's, so that the process of a runtime that does not need torch does
    not import it, which would dominate its start and add to its memory.
    """

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        """Return all outputs for these texts.

        For a causal model these are the logits of every next token [batch, tokens, vocabulary], for a classifier those
        of the classes [batch, classes], for an encoder the last hidden states [batch, tokens, width].
        """

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        """Start a new sequence with these tokens; return the logits of the next token, or `answer` of an encoder."""

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        """Append a token to the sequence, whose keys and values are cached; return the logits of the next token.

        Raises ValueError for encoders and without a `prefill` before it.
        """


class Runtime(Protocol):
    """The interface of a module `on_NAME.py`."""

    LIBRARY: str
    """The distribution that runs models, whose version is recorded with measurements."""
    FORMAT: str
    """The format in which candidates are written for it, a name of `jobs.formats`."""
    READS: tuple[str, ...]
    """All formats that it can run."""

    def missing(self) -> str | None:
        """Return which library must be installed for this runtime, with the command; None if none is missing."""

    def start(self, folder: Path, threads: int) -> Runner:
        """Load the model of this folder, in a format of READS, to run it with this number of threads."""


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all runtimes, from the files of this folder."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted(name.removeprefix(_PREFIX) for name in modules if name.startswith(_PREFIX)))


def load(name: str) -> Runtime:
    """Return the runtime of `jobs/runtimes/on_NAME.py`; raise LookupError, which lists all, if there is none."""
    return cast(Runtime, module_of("runtime", name, names(), f"{__name__}.{_PREFIX}{name}"))


def runtime_for(format: str) -> str:
    """Return the first installed runtime that runs a format.

    Raises LookupError, which names the library to install, if there is none.
    """
    reasons = []
    for name in names():
        runtime = load(name)
        if format not in runtime.READS:
            continue
        reason = runtime.missing()
        if reason is None:
            return name
        reasons.append(reason)
    advice = "; ".join(reasons) or "slimfront has no runtime for it"
    raise LookupError(f"no installed runtime runs {format}: {advice}")
