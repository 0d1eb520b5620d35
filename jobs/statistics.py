"""Statistics: what many candidates need to know of one parent model, computed once and kept in files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs.context import Report
from jobs.model import Model
from jobs.streaming import stream

Rows = Int[Tensor, "samples tokens"]

_TOKENS_AT_ONCE = 2048
_TILE = 512

Part = tuple[dict[str, Tensor], dict[str, str]]
"""Named tensors, and notes to keep beside them."""


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
class Grams:
    """What each linear inside the blocks reads, over all calibration tokens x: E[x xᵀ], E[x] and max |x|.

    sharing: the linears that read the same input (queries, keys and values do), under the first of them.
    """

    stored: Mapping[str, Tensor]
    sharing: Mapping[str, tuple[str, ...]]

    def gram(self, linear: str) -> Float[Tensor, "in in"]:
        """E[x xᵀ] in fp32. Its diagonal is the square of the activation norms (over √tokens)."""
        return self.stored[f"{self._owner(linear)}.gram"]

    def mean(self, linear: str) -> Float[Tensor, " in"]:
        return self.stored[f"{self._owner(linear)}.mean"]

    def peak(self, linear: str) -> Float[Tensor, " in"]:
        """max |x| of each input."""
        return self.stored[f"{self._owner(linear)}.peak"]

    def _owner(self, linear: str) -> str:
        for owner, readers in self.sharing.items():
            if linear in readers:
                return owner
        raise LookupError(f"no statistics of a linear called {linear!r}")


class Statistics:
    """The statistics of one parent model on one calibration text.

    folder: where they are kept as `KEY-KIND.PART.safetensors`; None keeps them in memory.
    key: names the pair of model and text.
    limit_bytes: of the folder; the least recently used files beyond it are removed after each write.

    Two workers may compute the same at once: the files are whole at any time, and the later one replaces
    an equal one.
    """

    def __init__(self, folder: Path | None, key: str, limit_bytes: int = 4 * 2**30) -> None:
        self._folder = folder
        self._key = key
        self._limit_bytes = limit_bytes
        self._memory: dict[str, Stored] = {}

    def grams(self, model: Model, calibration: Rows, report: Report) -> Grams:
        """The Gram matrix and the mean of every linear's inputs; ValueError names a linear that reads NaN."""
        stored = self.streamed("gram", lambda: _grams(model, calibration, report))
        sharing: dict[str, tuple[str, ...]] = {}
        for note in stored.about.values():
            sharing |= json.loads(note)
        return Grams(stored, sharing)

    def block_influence(self, model: Model, calibration: Rows, report: Report) -> Float[Tensor, " blocks"]:
        """1 − the mean cosine between what enters a block and what leaves it (Men et al. 2024,
        ShortGPT, arXiv:2403.03853, eq. 1): how much the block does to a token."""
        return self.stored("influence", lambda: _influence(model, calibration, report))["influence"]

    def residual_gram(
        self, model: Model, norms: Sequence[str], calibration: Rows, report: Report
    ) -> Float[Tensor, "width width"]:
        """The mean over these norms of E[x xᵀ] of the hidden states x that they are given, each divided by its
        root mean square (after centring, where it is a LayerNorm): their weights are left out."""
        compute = lambda: _residual_gram(model, norms, calibration, report)  # noqa: E731
        return self.stored("residual", compute)["gram"]

    def stored(self, kind: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]) -> Stored:
        """The tensors of this kind, and the notes beside them, from the cache or else from `compute`."""
        return self.streamed(kind, lambda: iter([compute()]))

    def streamed(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        """The same in parts, each written before the next is computed: one at a time is held in memory."""
        if kind not in self._memory:
            if self._folder is None:
                self._memory[kind] = _joined([_held(*part) for part in compute()])
            else:
                files = _Files(self._folder, f"{self._key}-{kind}")
                found = files.open()
                if found is None:
                    files.write(compute())
                    found = files.open()
                    _evict(self._folder, self._limit_bytes, files.stem)
                if found is None:
                    raise LookupError(f"the statistics {files.stem} in {self._folder} vanished while written")
                self._memory[kind] = found
        return self._memory[kind]


@dataclass(frozen=True)
class _Files:
    """The files of one kind of statistics: its parts, and a last one without tensors that says how many."""

    folder: Path
    stem: str

    def open(self) -> Stored | None:
        """What they hold; None where they are not complete."""
        try:
            parts = int(_open(self._file("parts")).about["parts"])
            return _joined([_open(self._file(str(part))) for part in range(parts)])
        except FileNotFoundError:
            return None

    def write(self, parts: Iterator[Part]) -> None:
        number = 0
        for number, part in enumerate(parts, start=1):
            _write(self._file(str(number - 1)), *part)
        _write(self._file("parts"), {}, {"parts": str(number)})

    def _file(self, part: str) -> Path:
        return self.folder / f"{self.stem}.{part}.safetensors"


def _held(tensors: dict[str, Tensor], about: dict[str, str]) -> Stored:
    return Stored(tuple(tensors), tensors.__getitem__, about)


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


def _evict(folder: Path, limit_bytes: int, keep: str) -> None:
    """Remove the files used longest ago, but those of the stem `keep`, until the folder is within its limit."""
    found = []
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.partial")]:
        try:
            state = file.stat()
        except FileNotFoundError:  # evicted by another worker
            continue
        found.append((state.st_mtime_ns, state.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit_bytes:
            return
        if not file.name.startswith(f"{keep}."):
            file.unlink(missing_ok=True)
            total -= size


@dataclass
class _Inputs:
    """Sums over what the linears of one block read, while calibration runs.

    Linears that are given the very same tensor share one sum, under the name of the first; `seen` holds
    the tensors of the pass that runs, so that none is freed and its identity taken by another.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def enter_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.clear()

    def reads(self, linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The hook that adds up what this linear reads."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            owner = next((owner for tensor, owner in self.seen if tensor is args[0]), None)
            self.owners[linear] = owner or linear
            if owner is None:
                self.seen.append((args[0], linear))
                self._add(linear, args[0].flatten(0, -2))

        return hook

    def _add(self, linear: str, x: Float[Tensor, "tokens in"]) -> None:
        if linear not in self.sums:
            width = x.shape[1]
            self.sums[linear] = torch.zeros(width, width, device=x.device)
            self.totals[linear] = torch.zeros(width, device=x.device)
            self.peaks[linear] = torch.zeros(width, device=x.device)
        self.totals[linear] += x.sum(dim=0, dtype=torch.float32)
        self.peaks[linear] = torch.maximum(self.peaks[linear], x.abs().amax(dim=0).float())
        add_gram(self.sums[linear], x)


def add_gram(total: Float[Tensor, "in in"], x: Float[Tensor, "tokens in"]) -> None:
    """total += xᵀx, in the tiles on and above the diagonal only (see `mirror`)."""
    wide = x.float()
    with _exact_for_bf16() if x.dtype == torch.bfloat16 else _as_it_is():
        for top in range(0, x.shape[1], _TILE):
            left = wide[:, top : top + _TILE]
            total[top : top + _TILE, top:] += left.T @ wide[:, top:]


def mirror(total: Float[Tensor, "in in"]) -> None:
    """Copy the upper triangle to the lower, in place."""
    total.copy_(total.triu() + total.triu(1).T)


@contextmanager
def _exact_for_bf16() -> Iterator[None]:
    """fp32 matrix products of values that are bf16 anyway: the product of two is exact in fp32, sums are
    fp32, and the processor's bf16 units take half the time of its fp32 ones."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _grams(model: Model, calibration: Rows, report: Report) -> Iterator[Part]:
    """Block by block: held are the Gram matrices of one, beside one hidden state per token."""
    linears = model.linears()
    for visit in stream(model, calibration, report, "Gram matrices"):
        inputs = _Inputs()
        inside = {name: part for name, part in linears.items() if name.startswith(f"{visit.name}.")}
        hooks = [layer.register_forward_pre_hook(inputs.reads(name)) for name, layer in inside.items()]
        hooks.append(visit.block.register_forward_pre_hook(inputs.enter_block, with_kwargs=True))
        try:
            visit.leave()
        finally:
            for hook in hooks:
                hook.remove()
        yield _gram_part(visit.name, inputs, calibration.numel())


def _gram_part(block: str, inputs: _Inputs, tokens: int) -> Part:
    tensors: dict[str, Tensor] = {}
    for linear, total in inputs.sums.items():
        mirror(total)
        tensors[f"{linear}.gram"] = _finite(total.div_(tokens), linear)
        tensors[f"{linear}.mean"] = inputs.totals[linear].div_(tokens)
        tensors[f"{linear}.peak"] = inputs.peaks[linear]
    sharing: dict[str, list[str]] = {}
    for linear, owner in inputs.owners.items():
        sharing.setdefault(owner, []).append(linear)
    return tensors, {block: json.dumps(sharing)}


def _influence(model: Model, calibration: Rows, report: Report) -> tuple[dict[str, Tensor], dict[str, str]]:
    sums = torch.zeros(len(model.blocks), dtype=torch.float64)

    def compare(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            cosines = nn.functional.cosine_similarity(args[0].float(), left.float(), dim=-1)
            sums[index] += cosines.double().sum().cpu()

        return hook

    hooks = [block.register_forward_hook(compare(index)) for index, block in enumerate(model.blocks)]
    try:
        _run(model, calibration, report, "block influence")
    finally:
        for hook in hooks:
            hook.remove()
    influence = 1 - sums / calibration.numel()
    for index, value in enumerate(influence):
        _finite(value, f"{model.blocks_name}.{index}")
    return {"influence": influence}, {}


def _residual_gram(
    model: Model, norms: Sequence[str], calibration: Rows, report: Report
) -> tuple[dict[str, Tensor], dict[str, str]]:
    total: Tensor | None = None

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        x = args[0].flatten(0, -2).float()
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * x.square().mean(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()
        if total is None:
            total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_gram(total, x)

    hooks = [model.module.get_submodule(name).register_forward_pre_hook(add) for name in norms]
    try:
        _run(model, calibration, report, "hidden states")
    finally:
        for hook in hooks:
            hook.remove()
    assert total is not None
    mirror(total)
    return {"gram": _finite(total.div_(calibration.numel() * len(norms)), "the residual stream")}, {}


@torch.no_grad()
def _run(model: Model, calibration: Rows, report: Report, what: str) -> None:
    """All of calibration through the blocks, without the head, whose logits nobody reads here."""
    device = next(model.module.parameters()).device
    rows = max(1, _TOKENS_AT_ONCE // calibration.shape[1])
    options = {"use_cache": False} if not model.family.encoder else {}
    for start in range(0, len(calibration), rows):
        report(start / len(calibration), what)
        model.base(calibration[start : start + rows].to(device), **options)


def _finite(tensor: Tensor, layer: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{layer} gives NaN or infinite statistics on the calibration text")
    return tensor
