"""Statistics: what many candidates need to know of one parent model, computed once and kept in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.calibration.block_stream import stream
from jobs.calibration.cache import Cache, Part, Stored
from jobs.models.model import Model
from jobs.models.placement import on_device, stream_blocks_to_device
from jobs.progress import Report

Rows = Int[Tensor, "samples tokens"]

_TOKENS_AT_ONCE = 2048
_TILE = 512


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

    folder, limit_bytes: where they are kept, and how much (see `Cache`); None keeps them in memory.
    key: names the pair of model and text.
    """

    def __init__(self, folder: Path | None, key: str, limit_bytes: int = 4 * 2**30) -> None:
        self._cache = Cache(folder, key, limit_bytes)

    @property
    def saved_seconds(self) -> float:
        """How long what was found in files had taken to compute."""
        return self._cache.saved_seconds

    def grams(self, model: Model, calibration: Rows, report: Report) -> Grams:
        """The Gram matrix and the mean of every linear's inputs; ValueError names a linear that reads NaN."""
        stored = self.streamed("gram", lambda: _grams(model, calibration, report))
        sharing: dict[str, tuple[str, ...]] = {}
        for note in stored.about.values():
            sharing |= json.loads(note)
        return Grams(stored, sharing)

    def inputs(
        self, model: Model, calibration: Rows, report: Report, sequential: bool
    ) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "in in"]]]:
        """Linears that read the same, with E[x xᵀ] of what they read, block by block, for who changes each before
        asking for the next. All of it lies on the model's device until then.

        sequential: x is what the blocks before, as they have become by then, give: two passes of the text for each
        candidate. Otherwise the Gram matrices are the parent's, kept for all.
        """
        if sequential:
            yield from _sequential(model, calibration, report)
            return
        grams = self.grams(model, calibration, report)
        for done, (owner, names) in enumerate(grams.sharing.items()):
            report(done / len(grams.sharing), owner)
            with on_device(model, *names):
                yield tuple(names), grams.gram(owner).to(model.device)

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

    def stored(self, kind: str, compute: Callable[[], Part]) -> Stored:
        """The tensors of this kind, and the notes beside them, from the cache or else from `compute`."""
        return self.streamed(kind, lambda: iter([compute()]))

    def streamed(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        """The same in parts, each kept before the next is computed."""
        return self._cache.streamed(kind, compute)


@dataclass
class Inputs:
    """Sums over what some linears of one block read.

    sums: Σ x xᵀ; totals: Σ x; peaks: max |x|. Linears that are given the very same tensor share one sum, under
    the name of the first (`owners` tells whose); `seen` holds the tensors of the pass that runs, so that none
    is freed and its identity taken by another.
    """

    sums: dict[str, Float[Tensor, "in in"]] = field(default_factory=dict)
    totals: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    peaks: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    @staticmethod
    def of(block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], None]) -> Inputs:
        """What these parts of a block read while `run` sends all text through it."""
        inputs = Inputs()
        hooks: list[Any] = [
            linear.register_forward_pre_hook(inputs._reads(name)) for name, linear in linears.items()
        ]
        hooks.append(block.register_forward_pre_hook(lambda module, args: inputs.seen.clear()))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        for total in inputs.sums.values():
            _mirror(total)
        return inputs

    def sharing(self) -> dict[str, list[str]]:
        """Who reads the same, under the first of them."""
        found: dict[str, list[str]] = {}
        for linear, owner in self.owners.items():
            found.setdefault(owner, []).append(linear)
        return found

    def _reads(self, linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
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
        _add_gram(self.sums[linear], x)


def _add_gram(total: Float[Tensor, "in in"], x: Float[Tensor, "tokens in"]) -> None:
    """total += xᵀx, in the tiles on and above the diagonal only (see `_mirror`)."""
    wide = x.float()
    with _exact_for_bf16() if x.dtype == torch.bfloat16 else _as_it_is():
        for top in range(0, x.shape[1], _TILE):
            left = wide[:, top : top + _TILE]
            total[top : top + _TILE, top:] += left.T @ wide[:, top:]


def _mirror(total: Float[Tensor, "in in"]) -> None:
    """Copy the upper triangle to the lower, in place."""
    total.copy_(total.triu() + total.triu(1).T)


@contextmanager
def _exact_for_bf16() -> Iterator[None]:
    """fp32 matrix products of values that are bf16 anyway: the product of two is exact in fp32, sums are
    fp32, and the processor's bf16 units take half the time of its fp32 ones. On a GPU it is the TF32 units,
    which read 11 bits of each number, bf16's 8 among them."""
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
        inside = {name: part for name, part in linears.items() if name.startswith(f"{visit.name}.")}
        yield _gram_part(visit.name, Inputs.of(visit.block, inside, visit.leave), calibration.numel())


def _sequential(
    model: Model, calibration: Rows, report: Report
) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "in in"]]]:
    for visit in stream(model, calibration, report, "inputs of compressed blocks"):
        inside = {name: part for name, part in model.linears().items() if name.startswith(f"{visit.name}.")}
        inputs = Inputs.of(visit.block, inside, visit.run)
        for owner, names in inputs.sharing().items():
            yield tuple(names), _finite(inputs.sums.pop(owner).div_(calibration.numel()), owner)


def _gram_part(block: str, inputs: Inputs, tokens: int) -> Part:
    tensors: dict[str, Tensor] = {}
    for linear, total in inputs.sums.items():
        tensors[f"{linear}.gram"] = _finite(total.div_(tokens), linear)
        tensors[f"{linear}.mean"] = inputs.totals[linear].div_(tokens)
        tensors[f"{linear}.peak"] = inputs.peaks[linear]
    return tensors, {block: json.dumps(inputs.sharing())}


def _influence(model: Model, calibration: Rows, report: Report) -> tuple[dict[str, Tensor], dict[str, str]]:
    sums = torch.zeros(len(model.blocks), dtype=torch.float64)
    for visit in stream(model, calibration, report, "block influence"):

        def compare(module: nn.Module, args: tuple[Any, ...], output: Any, index: int = visit.index) -> None:
            left = output[0] if isinstance(output, tuple) else output
            cosines = nn.functional.cosine_similarity(args[0].float(), left.float(), dim=-1)
            sums[index] += cosines.double().sum().cpu()

        hook = visit.block.register_forward_hook(compare)
        try:
            visit.leave()
        finally:
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
        _add_gram(total, x)

    hooks = [model.module.get_submodule(name).register_forward_pre_hook(add) for name in norms]
    try:
        _run(model, calibration, report, "hidden states")
    finally:
        for hook in hooks:
            hook.remove()
    assert total is not None
    _mirror(total)
    return {"gram": _finite(total.div_(calibration.numel() * len(norms)), "the residual stream")}, {}


@torch.no_grad()
def _run(model: Model, calibration: Rows, report: Report, what: str) -> None:
    """All of calibration through the blocks, without the head, whose logits nobody reads here."""
    rows = max(1, _TOKENS_AT_ONCE // calibration.shape[1])
    options = {"use_cache": False} if not model.family.encoder else {}
    with stream_blocks_to_device(model):
        for start in range(0, len(calibration), rows):
            report(start / len(calibration), what)
            model.base(calibration[start : start + rows].to(model.device), **options)


def _finite(tensor: Tensor, layer: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{layer} gives NaN or infinite statistics on the calibration text")
    return tensor
