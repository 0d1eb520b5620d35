"""Residency: which parts of a model lie on the device that it computes on, while the others rest on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from jobs.models.model import Model


@contextmanager
def on_device(model: Model, *names: str) -> Iterator[None]:
    """Let the parts of these full names lie on the model's device until the end of the block; "" is the whole.

    What stands in their places by then, changed or replaced, rests on the CPU again, and so does what was
    replaced: who still holds it would hold the device's memory. A part that lies on the device already stays
    there, so that who needs one linear need not know who holds its block.
    """
    moved = [name for name in names if not _lies_on(model.module.get_submodule(name), model.device)]
    for name in moved:
        _move(model.module.get_submodule(name), model.device)
    before = [part for name in moved for part in model.module.get_submodule(name).modules()]
    try:
        yield
    finally:
        for part in (*before, *(model.module.get_submodule(name) for name in moved)):
            _move(part, "cpu")


@contextmanager
def stream_blocks_to_device(model: Model) -> Iterator[None]:
    """Let the base model run whole with one block on the device at a time, until the end of the block of code:
    what stands around its blocks lies there meanwhile, and each block while it runs.

    A pass moves every block there and back, so who can send all text through one block after the other
    (`jobs.calibration.block_stream`) is faster.
    """
    running = ExitStack()

    def entering(name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            running.enter_context(on_device(model, name))

        return enter

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.close()

    hooks: list[Any] = []
    for index, block in enumerate(model.blocks):
        hooks.append(block.register_forward_pre_hook(entering(f"{model.blocks_name}.{index}")))
        hooks.append(block.register_forward_hook(leave))
    try:
        with on_device(model, *_around_the_blocks(model)):
            yield
    finally:
        running.close()  # of a pass that was cut off within a block
        for hook in hooks:
            hook.remove()


def move_all(model: Model) -> Model:
    """The model, all of it on its device from now on: one that only ever runs whole, as a teacher does."""
    _move(model.module, model.device)
    return model


def _move(part: nn.Module, device: str) -> None:
    part.to(device)


def _lies_on(part: nn.Module, device: str) -> bool:
    kind = torch.device(device).type
    tensors = (*part.parameters(), *part.buffers())
    return all(tensor.device.type == kind for tensor in tensors)


def _around_the_blocks(model: Model) -> list[str]:
    """The full names of what the base model holds beside its blocks: embeddings, norms, a pooler."""
    found: list[str] = []
    owner, prefix = model.base, model.base_prefix
    for child in model.family.blocks.split("."):
        found += [prefix + name for name, _ in owner.named_children() if name != child]
        owner, prefix = owner.get_submodule(child), f"{prefix}{child}."
    return found
