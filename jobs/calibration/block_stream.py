"""Send calibration text through a model block by block, so that only one block's statistics are in memory."""

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


BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block after the hidden state."""


@dataclass
class _Batch:
    """The input of the next block for some rows of text."""

    state: Float[Tensor, "rows tokens width"]
    """The hidden state, on the CPU in the model's dtype."""
    arguments: list[BlockArguments]
    """For each block, its arguments after the hidden state: masks and positions. They do not depend on the text, since
    all windows have one length and no padding."""


class _FirstBlockReached(Exception):  # noqa: N818
    """Ends a forward pass at the first block. It is no error."""


@dataclass
class Visit:
    """One block and its inputs. It ends with `leave`."""

    index: int
    name: str
    block: nn.Module
    _batches: list[_Batch]
    _forward: Callable[[_Batch], Tensor]
    _ended: bool = False

    def inputs(self) -> Iterator[Float[Tensor, "rows tokens width"]]:
        """Yield the inputs of the block, batch by batch, on the CPU."""
        self._check()
        for batch in self._batches:
            yield batch.state

    def run(self) -> None:
        """Run the block on all inputs, for the hooks of its parts. May be called several times."""
        self._check()
        for batch in self._batches:
            self._forward(batch)

    def leave(self) -> None:
        """Run the block as it is now on all inputs; its outputs become the inputs of the next block.

        Hooks see this pass too, so a visitor that changes nothing needs no `run`. Call it at most once. The stream
        calls it before the next visit if the visitor has not.
        """
        self._check()
        for batch in self._batches:
            batch.state = self._forward(batch).cpu()
        self._ended = True

    @property
    def ended(self) -> bool:
        """Whether `leave` was called."""
        return self._ended

    def _check(self) -> None:
        if self._ended:
            raise RuntimeError(f"the visit of {self.name} has ended: its inputs are gone")


def stream(
    model: Model, calibration: Int[Tensor, "samples tokens"], report: Report, activity: str
) -> Iterator[Visit]:
    """Visit block after block with the activations of all `calibration` text.

    A visitor may hook the parts of a block, replace them, and run the block several times. Later blocks get the
    outputs of the changed ones. Blocks must not be added or removed during the stream. One hidden state per token is
    kept on the CPU. The inputs of each block equal, bit by bit, those of whole forward passes of `TOKENS_AT_ONCE`
    tokens. The visited block lies on the model's device.
    """
    with stream_blocks_to_device(model):
        batches = _first_inputs(model, calibration)
    blocks = list(model.blocks)
    for index in range(len(blocks)):

        def forward(batch: _Batch, index: int = index) -> Tensor:
            report(index / len(blocks), f"{activity}, block {index}")
            args, kwargs = batch.arguments[index]
            with torch.no_grad():
                output = model.blocks[index](batch.state.to(model.device), *args, **kwargs)
            if isinstance(output, tuple):
                output = output[0]
            return cast(Tensor, output)

        name = f"{model.blocks_name}.{index}"
        with on_device(model, name):
            visit = Visit(index, name, model.blocks[index], batches, forward)
            yield visit
            if not visit.ended and index + 1 < len(blocks):
                visit.leave()


def _first_inputs(model: Model, calibration: Int[Tensor, "samples tokens"]) -> list[_Batch]:
    """Return the inputs of the first block.

    The arguments of blocks are recorded once per batch size: the last batch may be smaller, and some models repeat
    positions for each row.
    """
    rows = max(1, TOKENS_AT_ONCE // calibration.shape[1])
    arguments: dict[int, list[BlockArguments]] = {}
    batches = []
    for start in range(0, len(calibration), rows):
        batch = calibration[start : start + rows].to(model.device)
        if len(batch) not in arguments:
            arguments[len(batch)] = _block_arguments(model, batch)
        batches.append(_Batch(_first_state(model, batch), arguments[len(batch)]))
    return batches


def _block_arguments(model: Model, batch: Int[Tensor, "rows tokens"]) -> list[BlockArguments]:
    """Record the arguments of each block after the hidden state.

    They do not depend on hidden states. So only the first block computes, to show the form of a block's output; the
    other blocks return their input.
    """
    arguments: list[BlockArguments] = []
    outputs: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append((args[1:], kwargs))

    def identity(state: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(outputs[0], tuple):
            return (state, *outputs[0][1:])
        return state

    hooks: list[Any] = [block.register_forward_pre_hook(record, with_kwargs=True) for block in model.blocks]
    hooks.append(model.blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output)))
    later_blocks = list(model.blocks)[1:]
    try:
        for block in later_blocks:
            block.forward = identity
        _pass(model, batch, hooks)
    finally:
        for block in later_blocks:
            del block.forward
    return arguments


def _first_state(model: Model, batch: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens width"]:
    states: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0].cpu())
        raise _FirstBlockReached

    _pass(model, batch, [model.blocks[0].register_forward_pre_hook(stop)])
    return states[0]


def _pass(model: Model, batch: Int[Tensor, "rows tokens"], hooks: list[Any]) -> None:
    """Run one pass without the head, whose logits are not needed, and remove the hooks."""
    options = {}
    if not model.family.encoder:
        options["use_cache"] = False
    try:
        with torch.no_grad():
            model.base(batch, **options)
    except _FirstBlockReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
