"""Move parts of a model to the device that it computes on, for as long as they are needed, and back to the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from jobs.models.model import Model


@contextmanager
def on_device(model: Model, *names: str) -> Iterator[None]:
    """Keep the submodules of these full names on the model's device within the context; "" is the whole model.

    On exit the submodules that then have these names are moved to the CPU, and so are the ones that were replaced,
    since a remaining reference would keep the device's memory. A submodule that is on the device on entry stays there:
    contexts may be nested.
    """
    moved = [name for name in names if not _is_on(model.module.get_submodule(name), model.device)]
    for name in moved:
        _move(model.module.get_submodule(name), model.device)
    submodules = [part for name in moved for part in model.module.get_submodule(name).modules()]
    try:
        yield
    finally:
        for part in (*submodules, *(model.module.get_submodule(name) for name in moved)):
            _move(part, "cpu")


@contextmanager
def stream_blocks_to_device(model: Model) -> Iterator[None]:
    """Let the base model run with one block on the device at a time, within the context.

    Each block is on the device while it runs, and the modules outside the blocks all the time. Every forward pass
    moves every block there and back, so `jobs.calibration.block_stream`, which sends all text through one block after
    the other, is faster where it can be used.
    """
    running_block = ExitStack()

    def loader(name: str) -> Any:
        def load_block(module: nn.Module, args: tuple[Any, ...]) -> None:
            running_block.enter_context(on_device(model, name))

        return load_block

    def unload_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running_block.close()

    hooks: list[Any] = []
    for index, block in enumerate(model.blocks):
        hooks.append(block.register_forward_pre_hook(loader(f"{model.blocks_name}.{index}")))
        hooks.append(block.register_forward_hook(unload_block))
    try:
        with on_device(model, *_names_outside_blocks(model)):
            yield
    finally:
        running_block.close()  # after an error within a block
        for hook in hooks:
            hook.remove()


def move_all(model: Model) -> Model:
    """Move the whole model to its device, for good, and return it: for models that run as they are, as teachers do."""
    _move(model.module, model.device)
    return model


def _move(part: nn.Module, device: str) -> None:
    part.to(device)


def _is_on(part: nn.Module, device: str) -> bool:
    kind = torch.device(device).type
    tensors = (*part.parameters(), *part.buffers())
    return all(tensor.device.type == kind for tensor in tensors)


def _names_outside_blocks(model: Model) -> list[str]:
    """Return the full names of the base model's submodules outside the blocks: embeddings, norms, a pooler."""
    names: list[str] = []
    owner, prefix = model.base, model.base_prefix
    for child in model.family.blocks.split("."):
        names += [prefix + name for name, _ in owner.named_children() if name != child]
        owner, prefix = owner.get_submodule(child), f"{prefix}{child}."
    return names
