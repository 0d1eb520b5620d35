"""A cache of named tensors in files, with eviction of the least recently used ones."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Part = tuple[dict[str, Tensor], dict[str, str]]
"""Named tensors, and notes that are stored with them."""

_PART = re.compile(r"(\.[^.]+)?\.(safetensors|partial)$|\.[^.]+$")
"""The different endings of the file names of one group."""


@dataclass(frozen=True)
class Stored(Mapping[str, Tensor]):
    """Named tensors that are read from their file one by one, at access."""

    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    about: Mapping[str, str]
    """The notes that were stored with them."""

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CachedStatistic:
    """A group of cache files that belong together: the statistics of one kind and key, or a traced graph."""

    name: str
    """The common part of the file names: `KEY-KIND` for statistics."""
    files: tuple[Path, ...]
    size_bytes: int
    used_at: float
    """Time of the last use, in seconds since 1970."""

    @property
    def key(self) -> str:
        return self.name.partition("-")[0]

    def remove(self) -> None:
        """Delete the files. Open files stay readable, and the next user computes them again."""
        for file in self.files:
            file.unlink(missing_ok=True)


class Cache:
    """Tensors of one key, by kind.

    folder: keeps them as `KEY-KIND.PART.safetensors`; None keeps them in memory. limit_bytes: maximum size of the
    folder; after each write, the least recently used groups are removed beyond it.

    Two workers may compute the same kind at once: files are always complete, and the later one replaces an equal one.
    """

    def __init__(self, folder: Path | None, key: str, limit_bytes: int) -> None:
        self._folder = folder
        self._key = key
        self._limit_bytes = limit_bytes
        self._memory: dict[str, Stored] = {}
        self.saved_seconds = 0.0
        """Time to compute the tensors that were found in files."""

    def streamed(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        """Return the tensors of this kind from the cache, or from `compute`.

        Each part is written before the next one is computed, so that one part at a time is in memory.
        """
        if kind not in self._memory:
            self._memory[kind] = self._load_or_compute(kind, compute)
        return self._memory[kind]

    def _load_or_compute(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        if self._folder is None:
            return _joined([_in_memory(*part) for part in compute()])
        files = _Files(self._folder, f"{self._key}-{kind}")
        stored = files.open()
        if stored is not None:
            self.saved_seconds += files.seconds()
            return stored
        started, saved_at_start = time.perf_counter(), self.saved_seconds

        def seconds() -> float:
            # Without the cache, the statistics that this computation reads would have taken their time as well.
            return time.perf_counter() - started + self.saved_seconds - saved_at_start

        files.write(compute(), seconds)
        stored = files.open()
        _evict(self._folder, self._limit_bytes, files.stem)
        if stored is None:
            raise LookupError(
                f"the statistics {files.stem} in {self._folder} were removed while they were written"
            )
        return stored


@dataclass(frozen=True)
class _Files:
    """The files of one kind of statistics: its parts, and a last file without tensors that holds their number and
    their computing time."""

    folder: Path
    stem: str

    def open(self) -> Stored | None:
        """Return their contents, or None if they are incomplete."""
        try:
            parts = int(_open(self._file("parts")).about["parts"])
            return _joined([_open(self._file(str(part))) for part in range(parts)])
        except FileNotFoundError:
            return None

    def seconds(self) -> float:
        """Return their computing time, or 0 if it is unknown."""
        try:
            return float(_open(self._file("parts")).about.get("seconds", 0.0))
        except FileNotFoundError:
            return 0.0

    def write(self, parts: Iterator[Part], seconds: Callable[[], float]) -> None:
        """Write all parts. `seconds` is called after the last one."""
        number = 0
        for number, part in enumerate(parts, start=1):
            _write(self._file(str(number - 1)), *part)
        _write(self._file("parts"), {}, {"parts": str(number), "seconds": f"{seconds():.3f}"})

    def _file(self, part: str) -> Path:
        return self.folder / f"{self.stem}.{part}.safetensors"


def _in_memory(tensors: dict[str, Tensor], about: dict[str, str]) -> Stored:
    return Stored(tuple(tensors), {name: tensor.cpu() for name, tensor in tensors.items()}.__getitem__, about)


def _joined(parts: Sequence[Stored]) -> Stored:
    """Return several groups as one. Their names must be disjoint."""
    owners = {name: part for part in parts for name in part.names}
    about = {key: note for part in parts for key, note in part.about.items()}
    return Stored(tuple(owners), lambda name: owners[name][name], about)


def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
    os.close(handle)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft, about)
        os.replace(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)


def _open(file: Path) -> Stored:
    os.utime(file)  # the time of the last use decides about eviction
    # The open file stays readable if another worker evicts it.
    opened = safe_open(file, framework="pt")
    about: dict[str, str] = opened.metadata() or {}  # type: ignore[no-untyped-call]
    return Stored(tuple(opened.keys()), opened.get_tensor, about)  # type: ignore[no-untyped-call]


def cached_statistics(folder: Path) -> list[CachedStatistic]:
    """Return the groups of a cache's folder, least recently used first. Files that vanish meanwhile are left out."""
    if not folder.is_dir():
        return []
    groups: dict[str, list[Path]] = {}
    for file in folder.iterdir():
        if file.is_file():
            groups.setdefault(_PART.sub("", file.name), []).append(file)
    statistics = []
    for name, files in groups.items():
        try:
            states = [file.stat() for file in files]
        except FileNotFoundError:
            continue
        used_at = max(max(state.st_mtime, state.st_atime) for state in states)
        size_bytes = sum(state.st_size for state in states)
        # A graph is found by its .xml and read with its .bin, so the .xml is removed first.
        statistics.append(CachedStatistic(name, tuple(sorted(files, reverse=True)), size_bytes, used_at))
    return sorted(statistics, key=lambda group: group.used_at)


def _evict(folder: Path, limit_bytes: int, keep: str) -> None:
    """Remove the least recently used groups, except `keep`, until the folder is within its limit."""
    groups = cached_statistics(folder)
    total = sum(group.size_bytes for group in groups)
    for group in groups:
        if total <= limit_bytes:
            return
        if group.name != keep:
            group.remove()
            total -= group.size_bytes
