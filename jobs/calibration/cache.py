"""Cache: named tensors that are computed once and kept in files, the least recently used making room."""

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
"""Named tensors, and notes to keep beside them."""

_PART = re.compile(r"(\.[^.]+)?\.(safetensors|partial)$|\.[^.]+$")
"""What the names of files that belong together end in, each in its own way."""


@dataclass(frozen=True)
class Stored(Mapping[str, Tensor]):
    """Named tensors, read from their file one by one, when asked for; `about` is what was noted beside them."""

    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    about: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CachedStatistic:
    """Files of a cache that are of use only together: the statistics of one kind of one key, or a traced graph.

    name: that of the files without what tells them apart, `KEY-KIND` of statistics. used_at: seconds since 1970.
    """

    name: str
    files: tuple[Path, ...]
    size_bytes: int
    used_at: float

    @property
    def key(self) -> str:
        return self.name.partition("-")[0]

    def remove(self) -> None:
        """Whoever reads them now reads on; whoever needs them next makes them again."""
        for file in self.files:
            file.unlink(missing_ok=True)


class Cache:
    """Tensors by their kind, all of one key.

    folder: where they are kept as `KEY-KIND.PART.safetensors`; None keeps them in memory.
    limit_bytes: of the folder; what was used longest ago is removed beyond it after each write.

    Two workers may compute the same at once: the files are whole at any time, and the later one replaces
    an equal one.

    spared_seconds: how long what was found in files had taken to compute, as if each had been alone.
    """

    def __init__(self, folder: Path | None, key: str, limit_bytes: int) -> None:
        self._folder = folder
        self._key = key
        self._limit_bytes = limit_bytes
        self._memory: dict[str, Stored] = {}
        self.saved_seconds = 0.0

    def streamed(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        """The tensors of this kind, and the notes beside them, from the cache or else from `compute`: each part
        is written before the next is computed, so that one at a time is held in memory."""
        if kind not in self._memory:
            self._memory[kind] = self._found(kind, compute)
        return self._memory[kind]

    def _found(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        if self._folder is None:
            return _joined([_held(*part) for part in compute()])
        files = _Files(self._folder, f"{self._key}-{kind}")
        found = files.open()
        if found is not None:
            self.saved_seconds += files.seconds()
            return found
        started, before = time.perf_counter(), self.saved_seconds
        # What is computed from other statistics of this key would have taken their time as well.
        files.write(compute(), lambda: time.perf_counter() - started + self.saved_seconds - before)
        found = files.open()
        _evict(self._folder, self._limit_bytes, files.stem)
        if found is None:
            raise LookupError(f"the statistics {files.stem} in {self._folder} vanished while written")
        return found


@dataclass(frozen=True)
class _Files:
    """The files of one kind of statistics: its parts, and a last one without tensors that says how many, and how
    long they took."""

    folder: Path
    stem: str

    def open(self) -> Stored | None:
        """What they hold; None where they are not complete."""
        try:
            parts = int(_open(self._file("parts")).about["parts"])
            return _joined([_open(self._file(str(part))) for part in range(parts)])
        except FileNotFoundError:
            return None

    def seconds(self) -> float:
        """How long they took; 0 where that is not known."""
        try:
            return float(_open(self._file("parts")).about.get("seconds", 0.0))
        except FileNotFoundError:
            return 0.0

    def write(self, parts: Iterator[Part], seconds: Callable[[], float]) -> None:
        """seconds: asked for when all parts are written."""
        number = 0
        for number, part in enumerate(parts, start=1):
            _write(self._file(str(number - 1)), *part)
        _write(self._file("parts"), {}, {"parts": str(number), "seconds": f"{seconds():.3f}"})

    def _file(self, part: str) -> Path:
        return self.folder / f"{self.stem}.{part}.safetensors"


def _held(tensors: dict[str, Tensor], about: dict[str, str]) -> Stored:
    return Stored(tuple(tensors), {name: tensor.cpu() for name, tensor in tensors.items()}.__getitem__, about)


def _joined(parts: Sequence[Stored]) -> Stored:
    """Several of which no name is in two."""
    owners = {name: part for part in parts for name in part.names}
    about = {key: note for part in parts for key, note in part.about.items()}
    return Stored(tuple(owners), lambda name: owners[name][name], about)


def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
    os.close(handle)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, about)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)


def _open(file: Path) -> Stored:
    os.utime(file)  # the time of last use, by which files are evicted
    # The open file stays readable if another worker evicts it meanwhile.
    opened = safe_open(file, framework="pt")
    about: dict[str, str] = opened.metadata() or {}  # type: ignore[no-untyped-call]
    return Stored(tuple(opened.keys()), opened.get_tensor, about)  # type: ignore[no-untyped-call]


def cached_statistics(folder: Path) -> list[CachedStatistic]:
    """What lies in a cache's folder, that used longest ago first; what other workers remove meanwhile is left out."""
    groups: dict[str, list[Path]] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file():
            groups.setdefault(_PART.sub("", file.name), []).append(file)
    found = []
    for name, files in groups.items():
        try:
            states = [file.stat() for file in files]
        except FileNotFoundError:
            continue
        used_at = max(max(state.st_mtime, state.st_atime) for state in states)
        size_bytes = sum(state.st_size for state in states)
        # A graph is found by its .xml and read with its .bin: that must not be the first to go.
        found.append(CachedStatistic(name, tuple(sorted(files, reverse=True)), size_bytes, used_at))
    return sorted(found, key=lambda one: one.used_at)


def _evict(folder: Path, limit_bytes: int, keep: str) -> None:
    """Remove what was used longest ago, but the statistics `keep`, until the folder is within its limit."""
    found = cached_statistics(folder)
    total = sum(one.size_bytes for one in found)
    for one in found:
        if total <= limit_bytes:
            return
        if one.name != keep:
            one.remove()
            total -= one.size_bytes
