"""Damage: what a step does to what a model predicts, each part of it alone. One pass tells of every mix of levels."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs import data
from jobs.context import Context
from jobs.materials import Materials
from jobs.models import loading, sources
from jobs.models.families import Task
from jobs.models.model import Model
from jobs.models.placement import move_all
from jobs.progress import Report
from jobs.recipe import Recipe
from jobs.run import JobDirs, context_of, device
from jobs.runtimes.on_torch import unpacked
from jobs.technique import Technique

_TOKENS = 2048
"""Tokens of calibration text that answers are compared on, about; whole windows, spread evenly over the text."""
_LINEARS_TOKENS = 512
_ROWS = 128
"""Positions whose logits are held in fp32 at once."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Divergences from what the parent predicts, all at least 0: nats a token, or a text that is classified, or for an
    embedding one less the cosine.

    parts: of the parent with one block, or one linear, as the step leaves it, for each of them in order; rest: with all
        but the blocks so.
    """

    parts: tuple[float, ...]
    rest: float


def measure_layer_sensitivity(
    recipes: Sequence[Recipe], materials: Materials, cache: Path, report: Report, by_linear: bool = False
) -> list[LayerSensitivity]:
    """What the one step of each recipe does to the original, from the statistics in `cache` or else measured now.

    by_linear: tell linears apart, on fewer tokens, since there are so many more.
    ValueError where there is no calibration text, or a step changes the number of blocks.
    """
    parent: list[_Parent] = []

    def measured(recipe: Recipe, context: Context) -> dict[str, Tensor]:
        if not parent:
            parent.append(_Parent(materials, by_linear))
        return parent[0].compared(recipe.steps[0], context)

    found = []
    for recipe in recipes:
        if materials.calibration is None or len(recipe.steps) != 1:
            raise ValueError(f"the damage of {recipe} takes one step and a calibration text to be measured")
        with tempfile.TemporaryDirectory() as workdir:
            context = context_of(recipe, materials, JobDirs(Path(workdir) / "made", cache), report)
            stored = context.statistics.stored(
                f"damage-{_LINEARS_TOKENS if by_linear else _TOKENS}-{recipe.id}",
                lambda recipe=recipe, context=context: (measured(recipe, context), {}),  # type: ignore[misc]
            )
        found.append(LayerSensitivity(tuple(stored["parts"].tolist()), float(stored["rest"])))
    return found


class _Parent:
    """The original, what it answers on some text, and what was found of parts in the place of its own.

    Settings that differ outside the blocks alone leave the same parts: these are compared once.
    """

    def __init__(self, materials: Materials, by_linear: bool) -> None:
        self._folder = sources.locate(materials.model)
        self._model = move_all(loading.load(self._folder, device()))
        self._batches = [_Batch.of(self._model, rows) for rows in _rows(materials, self._folder, by_linear)]
        layout = self._model.layout()
        blocks = [f"{self._model.blocks_name}.{index}" for index in range(len(self._model.blocks))]
        self._parts = list(layout.linears) if by_linear else blocks
        self._found: dict[tuple[str, str], float] = {}

    def compared(self, step: Technique, context: Context) -> dict[str, Tensor]:
        changed = move_all(unpacked(step.compress(loading.load(self._folder, device()), context)))
        own = list(self._model.blocks)
        if len(changed.blocks) != len(own):
            raise ValueError(f"{step} leaves {len(changed.blocks)} of {len(own)} blocks: none is what it was")
        parts = []
        for done, name in enumerate(self._parts):
            context.report(done / len(self._parts), f"damage of {step} to {name}")
            parts.append(self._of_part(name, changed.module.get_submodule(name)))
        for index, block in enumerate(own):
            changed.blocks[index] = block
        rest = self._mean(lambda batch: batch.divergence(changed))
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in (("parts", parts), ("rest", rest))
        }

    def _of_part(self, name: str, part: nn.Module) -> float:
        same, block = (
            (name, _digest(part)),
            int(name.removeprefix(f"{self._model.blocks_name}.").split(".")[0]),
        )
        if same not in self._found:
            with _in_the_place_of(self._model, name, part):
                self._found[same] = self._mean(lambda batch: batch.from_block(self._model, block))
        return self._found[same]

    def _mean(self, of: Callable[[_Batch], float]) -> float:
        found = sum(of(batch) for batch in self._batches) / len(self._batches)
        if not math.isfinite(found):
            raise FloatingPointError("the model answers NaN on the calibration text")
        return found


def _digest(part: nn.Module) -> str:
    told = hashlib.sha256()
    for name, tensor in part.state_dict().items():
        told.update(name.encode())
        told.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return told.hexdigest()


def _rows(materials: Materials, folder: Path, by_linear: bool) -> Iterator[Int[Tensor, "1 tokens"]]:
    assert materials.calibration is not None
    rows = data.windows_for(materials.calibration, folder)
    tokens = _LINEARS_TOKENS if by_linear else _TOKENS
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    for number in range(count):
        yield rows[number * len(rows) // count].unsqueeze(0)


@dataclass(frozen=True)
class _Batch:
    """A window of text, what the parent answers, and what enters each of its blocks."""

    rows: Int[Tensor, "1 tokens"]
    answer: Float[Tensor, "1 ..."]
    states: Sequence[Float[Tensor, "1 tokens width"]]
    in_tuples: bool

    @staticmethod
    def of(parent: Model, rows: Int[Tensor, "1 tokens"]) -> _Batch:
        states: list[Tensor] = []
        outputs: list[Any] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in parent.blocks
        ]
        hooks.append(parent.blocks[0].register_forward_hook(lambda _, args, output: outputs.append(output)))
        try:
            with torch.inference_mode():
                answer = parent.answer(rows.to(parent.device))
        finally:
            for hook in hooks:
                hook.remove()
        return _Batch(rows, answer, states, isinstance(outputs[0], tuple))

    def from_block(self, model: Model, index: int) -> float:
        """How far this model's answer is from the parent's, whose blocks before this one it shares: they are not
        run again."""
        state = self.states[index]
        before = [cast(Any, block) for block in list(model.blocks)[:index]]
        given = (state,) if self.in_tuples else state
        for block in before:
            block.forward = lambda *_, **__: given
        try:
            return self.divergence(model)
        finally:
            for block in before:
                del block.forward

    def divergence(self, model: Model) -> float:
        with torch.inference_mode():
            return divergence(self.answer, model.answer(self.rows.to(model.device)), model.task)


def divergence(
    meant: Float[Tensor, "*rows outputs"], said: Float[Tensor, "*rows outputs"], task: Task
) -> float:
    """The mean of KL(meant ‖ said) over rows of logits; of one number alone the squared difference, of embeddings one
    less the cosine."""
    total, rows = 0.0, meant.flatten(0, -2)
    for at in range(0, len(rows), _ROWS):
        ours, theirs = rows[at : at + _ROWS].float(), said.flatten(0, -2)[at : at + _ROWS].float()
        if task == "embedding":
            each = 1 - nn.functional.cosine_similarity(ours, theirs, dim=-1)
        elif ours.shape[-1] == 1:
            each = (ours - theirs).square()
        else:
            log = ours.log_softmax(dim=-1)
            each = (log.exp() * (log - theirs.log_softmax(dim=-1))).sum(dim=-1)
        total += float(each.double().sum())
    return max(total / len(rows), 0.0)


@contextmanager
def _in_the_place_of(model: Model, name: str, part: nn.Module) -> Iterator[None]:
    own = model.module.get_submodule(name)
    model.replace(name, part)
    try:
        yield
    finally:
        model.replace(name, own)
