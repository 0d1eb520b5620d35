"""Streaming: calibration text through a model one block at a time, so that only one block's statistics are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.models.model import Model
from jobs.models.placement import on_device, stream_blocks_to_device
from jobs.progress import Report

TOKENS_AT_ONCE = 2048
"""Tokens of one forward pass."""


@dataclass
class _Batch:
    """What enters the next block, on the CPU in the model's own dtype, and what each block is given beside it.

    given: per block, the arguments after the hidden state: masks and positions, which do not depend on
    the text, since all windows are of one length and none is padded.
    """

    state: Float[Tensor, "rows tokens width"]
    given: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass where the first block would start
    pass


@dataclass
class Visit:
    """One block, and all that is about to enter it, until it is left."""

    index: int
    name: str
    block: nn.Module
    _batches: list[_Batch]
    _forward: Callable[[_Batch], Tensor]
    _left: bool = False

    def inputs(self) -> Iterator[Float[Tensor, "rows tokens width"]]:
        """What enters the block, batch by batch, on the CPU."""
        self._check()
        for batch in self._batches:
            yield batch.state

    def run(self) -> None:
        """Send everything through the block, for the hooks that its parts bear; may be called again."""
        self._check()
        for batch in self._batches:
            self._forward(batch)

    def leave(self) -> None:
        """Send everything through the block as it is now; what comes out enters the next one.

        Hooks see this pass too, so who changes nothing needs no `run`. Called once at most; if it was not
        called, the stream does so before the next visit.
        """
        self._check()
        for batch in self._batches:
            batch.state = self._forward(batch).cpu()
        self._left = True

    @property
    def left(self) -> bool:
        return self._left

    def _check(self) -> None:
        if self._left:
            raise RuntimeError(f"{self.name} was left: what entered it is gone")


def stream(
    model: Model, calibration: Int[Tensor, "samples tokens"], report: Report, what: str
) -> Iterator[Visit]:
    """Visit block after block with the activations that all of `calibration` has there.

    A visitor may hook the block's parts, replace them, and run the block as often as it likes: later
    blocks see what the changed ones give. Blocks must not be added or removed meanwhile. Held is one
    hidden state per token, on the CPU; the inputs of each block are, bit by bit, those of whole forward
    passes of `TOKENS_AT_ONCE` tokens. The block that is visited lies on the model's device.
    """
    with stream_blocks_to_device(model):
        batches = _entering(model, calibration)
    blocks = list(model.blocks)
    for index in range(len(blocks)):

        def forward(batch: _Batch, index: int = index) -> Tensor:
            report(index / len(blocks), f"{what}, block {index}")
            args, kwargs = batch.given[index]
            with torch.no_grad():
                output = model.blocks[index](batch.state.to(model.device), *args, **kwargs)
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        name = f"{model.blocks_name}.{index}"
        with on_device(model, name):
            visit = Visit(index, name, model.blocks[index], batches, forward)
            yield visit
            if not visit.left and index + 1 < len(blocks):
                visit.leave()


def _entering(model: Model, calibration: Int[Tensor, "samples tokens"]) -> list[_Batch]:
    """What enters the first block. What blocks are given is looked at once per size of
    batch: the last one may be smaller than the others, and some models repeat positions for each row."""
    rows = max(1, TOKENS_AT_ONCE // calibration.shape[1])
    given: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    batches = []
    for start in range(0, len(calibration), rows):
        batch = calibration[start : start + rows].to(model.device)
        if len(batch) not in given:
            given[len(batch)] = _given(model, batch)
        batches.append(_Batch(_first_state(model, batch), given[len(batch)]))
    return batches


def _given(model: Model, batch: Int[Tensor, "rows tokens"]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is given beside the state. Nothing of it depends on states, so of all blocks the first alone
    computes, to see in what form they answer; the others let the state through."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    answers: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[1:], kwargs))

    def let_through(state: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (state, *answers[0][1:]) if isinstance(answers[0], tuple) else state

    hooks: list[Any] = [block.register_forward_pre_hook(note, with_kwargs=True) for block in model.blocks]
    hooks.append(model.blocks[0].register_forward_hook(lambda module, args, output: answers.append(output)))
    others = list(model.blocks)[1:]
    try:
        for block in others:
            block.forward = let_through
        _pass(model, batch, hooks)
    finally:
        for block in others:
            del block.forward
    return found


def _first_state(model: Model, batch: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens width"]:
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].cpu())
        raise _Reached

    _pass(model, batch, [model.blocks[0].register_forward_pre_hook(stop)])
    return found[0]


def _pass(model: Model, batch: Int[Tensor, "rows tokens"], hooks: list[Any]) -> None:
    """One pass without the head, whose logits nobody reads here; takes the hooks away."""
    options = {} if model.family.encoder else {"use_cache": False}
    try:
        with torch.no_grad():
            model.base(batch, **options)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
