"""Statistics of one parent model that many candidates share, computed once and kept in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
"""Tokens of one forward pass."""
_TILE = 512
"""Columns of a Gram matrix that are computed at once; tiles below the diagonal are skipped."""


@dataclass(frozen=True)
class Grams:
    """Moments of the inputs x of each linear inside the blocks, over all calibration tokens: E[x xᵀ], E[x], max |x|."""

    stored: Mapping[str, Tensor]
    sharing: Mapping[str, tuple[str, ...]]
    """Linears with the same input (such as queries, keys and values), by the first of them."""

    def gram(self, linear: str) -> Float[Tensor, "in in"]:
        """Return E[x xᵀ] in fp32. Its diagonal holds the squared activation norms divided by the number of tokens."""
        return self.stored[f"{self._owner(linear)}.gram"]

    def mean(self, linear: str) -> Float[Tensor, " in"]:
        """Return E[x]."""
        return self.stored[f"{self._owner(linear)}.mean"]

    def peak(self, linear: str) -> Float[Tensor, " in"]:
        """Return max |x| of each input."""
        return self.stored[f"{self._owner(linear)}.peak"]

    def _owner(self, linear: str) -> str:
        for owner, readers in self.sharing.items():
            if linear in readers:
                return owner
        raise LookupError(f"there are no statistics of a linear called {linear!r}")


class Statistics:
    """The statistics of one parent model on one calibration text.

    folder, limit_bytes: see `Cache`; without a folder they stay in memory. key: names the pair of model and text.
    """

    def __init__(self, folder: Path | None, key: str, limit_bytes: int = 4 * 2**30) -> None:
        self._cache = Cache(folder, key, limit_bytes)

    @property
    def saved_seconds(self) -> float:
        """Time to compute the statistics that were found in files."""
        return self._cache.saved_seconds

    def grams(self, model: Model, calibration: Rows, report: Report) -> Grams:
        """Return the moments of every linear's inputs. Raises ValueError for NaN or infinite values."""
        stored = self.streamed("gram", lambda: _grams(model, calibration, report))
        sharing: dict[str, tuple[str, ...]] = {}
        for note in stored.about.values():
            sharing |= json.loads(note)
        return Grams(stored, sharing)

    def inputs(
        self, model: Model, calibration: Rows, report: Report, sequential: bool
    ) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "in in"]]]:
        """Yield groups of linears with the same input x, and E[x xᵀ], block by block.

        The caller may change each group before it takes the next one. Linears and matrix lie on the model's device.
        sequential: x is the output of the already changed blocks, which needs two passes over the text for each
        candidate. Otherwise the Gram matrices are the parent's, shared by all candidates.
        """
        if sequential:
            yield from _sequential(model, calibration, report)
            return
        grams = self.grams(model, calibration, report)
        for number, (owner, names) in enumerate(grams.sharing.items()):
            report(number / len(grams.sharing), owner)
            with on_device(model, *names):
                yield tuple(names), grams.gram(owner).to(model.device)

    def block_influence(self, model: Model, calibration: Rows, report: Report) -> Float[Tensor, " blocks"]:
        """Return 1 − the mean cosine similarity of a block's input and output (Men et al. 2024, ShortGPT,
        arXiv:2403.03853, eq. 1)."""
        return self.stored("influence", lambda: _influence(model, calibration, report))["influence"]

    def residual_gram(
        self, model: Model, norms: Sequence[str], calibration: Rows, report: Report
    ) -> Float[Tensor, "width width"]:
        """Return the mean over these norms of E[x xᵀ] of their normalized inputs x, without the norms' weights.

        Each x is divided by its root mean square, after centring for a LayerNorm.
        """
        return self.stored("residual", lambda: _residual_gram(model, norms, calibration, report))["gram"]

    def stored(self, kind: str, compute: Callable[[], Part]) -> Stored:
        """Return the tensors of this kind from the cache, or from `compute`."""
        return self.streamed(kind, lambda: iter([compute()]))

    def streamed(self, kind: str, compute: Callable[[], Iterator[Part]]) -> Stored:
        """Return the same for parts, each of which is stored before the next one is computed."""
        return self._cache.streamed(kind, compute)


@dataclass
class Inputs:
    """Sums over the inputs x of some linears of one block. Linears with the identical input tensor share them."""

    sums: dict[str, Float[Tensor, "in in"]] = field(default_factory=dict)
    """Σ x xᵀ, by the first linear with this input."""
    totals: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    """Σ x."""
    peaks: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    """max |x|."""
    owners: dict[str, str] = field(default_factory=dict)
    """For each linear, the first linear with the same input."""
    pass_inputs: list[tuple[Tensor, str]] = field(default_factory=list)
    """The input tensors of the current pass and their linears. They are kept so that no identity is used twice."""

    @staticmethod
    def of(block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], None]) -> Inputs:
        """Collect the inputs of these parts of a block while `run` sends all text through it."""
        inputs = Inputs()
        hooks: list[Any] = [
            linear.register_forward_pre_hook(inputs._hook(name)) for name, linear in linears.items()
        ]
        hooks.append(block.register_forward_pre_hook(lambda module, args: inputs.pass_inputs.clear()))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        for total in inputs.sums.values():
            _mirror(total)
        return inputs

    def sharing(self) -> dict[str, list[str]]:
        """Return the linears with the same input, by the first of them."""
        groups: dict[str, list[str]] = {}
        for linear, owner in self.owners.items():
            groups.setdefault(owner, []).append(linear)
        return groups

    def _hook(self, linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return the hook that adds the inputs of this linear to the sums."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            owner = next((owner for tensor, owner in self.pass_inputs if tensor is args[0]), None)
            self.owners[linear] = owner or linear
            if owner is None:
                self.pass_inputs.append((args[0], linear))
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
    precision: AbstractContextManager[None] = nullcontext()
    if x.dtype == torch.bfloat16:
        precision = _exact_for_bf16()
    with precision:
        for top in range(0, x.shape[1], _TILE):
            tile = wide[:, top : top + _TILE]
            total[top : top + _TILE, top:] += tile.T @ wide[:, top:]


def _mirror(total: Float[Tensor, "in in"]) -> None:
    """Copy the upper triangle to the lower, in place."""
    total.copy_(total.triu() + total.triu(1).T)


@contextmanager
def _exact_for_bf16() -> Iterator[None]:
    """Compute fp32 matrix products of bf16 values on faster units, with the same precision.

    The product of two bf16 values is exact in fp32, and sums are fp32. The processor's bf16 units take half the time of
    its fp32 units. A GPU uses its TF32 units, which read 11 bits of a mantissa; bf16 has 8.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _grams(model: Model, calibration: Rows, report: Report) -> Iterator[Part]:
    """Compute block by block: the Gram matrices of one block and one hidden state per token are in memory."""
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
            state = output[0] if isinstance(output, tuple) else output
            cosines = nn.functional.cosine_similarity(args[0].float(), state.float(), dim=-1)
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
def _run(model: Model, calibration: Rows, report: Report, activity: str) -> None:
    """Run all calibration text through the blocks, without the head, whose logits are not needed."""
    rows = max(1, _TOKENS_AT_ONCE // calibration.shape[1])
    options = {}
    if not model.family.encoder:
        options["use_cache"] = False
    with stream_blocks_to_device(model):
        for start in range(0, len(calibration), rows):
            report(start / len(calibration), activity)
            model.base(calibration[start : start + rows].to(model.device), **options)


def _finite(tensor: Tensor, layer: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{layer} gives NaN or infinite statistics on the calibration text")
    return tensor
