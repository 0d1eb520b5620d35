"""Layer sensitivity: the divergence of a model's predictions when a step changes one layer alone.

One measurement serves every mix of settings over layers.
"""

from __future__ import annotations

import functools
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
"""Approximate number of calibration tokens that are compared: whole windows, spread evenly over the text."""
_LINEARS_TOKENS = 512
"""The same for single linears, of which there are many more."""
_ROWS = 128
"""Positions whose logits are converted to fp32 at once."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Divergences from the original's predictions, at least 0.

    The unit is nats per token, nats per classified text, or 1 − cosine for embeddings.
    """

    parts: tuple[float, ...]
    """For each block, or each linear, in order: the divergence of the original with this one part changed."""
    rest: float
    """The divergence of the original with everything but the blocks changed."""


def measure_layer_sensitivity(
    recipes: Sequence[Recipe], materials: Materials, cache: Path, report: Report, by_linear: bool = False
) -> list[LayerSensitivity]:
    """Return the layer sensitivity for the one step of each recipe, from `cache` or measured now.

    by_linear: measure each linear instead of each block, on fewer tokens. Raises ValueError if there is no calibration
    text or if a step changes the number of blocks.
    """
    tokens = _LINEARS_TOKENS if by_linear else _TOKENS
    original: list[_Original] = []  # loaded only if something must be measured

    def measure(recipe: Recipe, context: Context) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not original:
            original.append(_Original(materials, by_linear))
        return original[0].compare(recipe.steps[0], context), {}

    sensitivities = []
    for recipe in recipes:
        if materials.calibration is None or len(recipe.steps) != 1:
            raise ValueError(f"the layer sensitivity of {recipe} needs one step and a calibration text")
        with tempfile.TemporaryDirectory() as workdir:
            context = context_of(recipe, materials, JobDirs(Path(workdir) / "made", cache), report)
            stored = context.statistics.stored(
                f"damage-{tokens}-{recipe.id}",  # the name in the caches of version 0.1.0
                functools.partial(measure, recipe, context),
            )
        sensitivities.append(LayerSensitivity(tuple(stored["parts"].tolist()), float(stored["rest"])))
    return sensitivities


class _Original:
    """The original, its predictions on some text, and the divergences of parts that replaced its own.

    Settings that differ only outside the blocks give the same parts, which are compared once.
    """

    def __init__(self, materials: Materials, by_linear: bool) -> None:
        self._folder = sources.locate(materials.model)
        self._model = move_all(loading.load(self._folder, device()))
        self._batches = [_Batch.of(self._model, rows) for rows in _rows(materials, self._folder, by_linear)]
        layout = self._model.layout()
        blocks = [f"{self._model.blocks_name}.{index}" for index in range(len(self._model.blocks))]
        self._parts = list(layout.linears) if by_linear else blocks
        self._divergences: dict[tuple[str, str], float] = {}

    def compare(self, step: Technique, context: Context) -> dict[str, Tensor]:
        """Return the divergences of each part and of the rest, as `LayerSensitivity` has them."""
        changed = move_all(unpacked(step.compress(loading.load(self._folder, device()), context)))
        blocks = list(self._model.blocks)
        if len(changed.blocks) != len(blocks):
            raise ValueError(
                f"{step} leaves {len(changed.blocks)} of {len(blocks)} blocks, so they cannot be compared one by one"
            )
        parts = []
        for number, name in enumerate(self._parts):
            context.report(number / len(self._parts), f"sensitivity of {name} to {step}")
            parts.append(self._part_divergence(name, changed.module.get_submodule(name)))
        for index, block in enumerate(blocks):
            changed.blocks[index] = block
        rest = self._mean(lambda batch: batch.divergence(changed))
        return {
            "parts": torch.tensor(parts, dtype=torch.float64),
            "rest": torch.tensor(rest, dtype=torch.float64),
        }

    def _part_divergence(self, name: str, part: nn.Module) -> float:
        key = (name, _digest(part))
        block = int(name.removeprefix(f"{self._model.blocks_name}.").split(".")[0])
        if key not in self._divergences:
            with _replaced(self._model, name, part):
                self._divergences[key] = self._mean(lambda batch: batch.from_block(self._model, block))
        return self._divergences[key]

    def _mean(self, divergence_of: Callable[[_Batch], float]) -> float:
        mean = sum(divergence_of(batch) for batch in self._batches) / len(self._batches)
        if not math.isfinite(mean):
            raise FloatingPointError("the logits of the model are NaN on the calibration text")
        return mean


def _digest(part: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in part.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _rows(materials: Materials, folder: Path, by_linear: bool) -> Iterator[Int[Tensor, "1 tokens"]]:
    assert materials.calibration is not None
    rows = data.windows_for(materials.calibration, folder)
    tokens = _LINEARS_TOKENS if by_linear else _TOKENS
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    for number in range(count):
        yield rows[number * len(rows) // count].unsqueeze(0)


@dataclass(frozen=True)
class _Batch:
    """A window of text with the original's predictions and hidden states."""

    rows: Int[Tensor, "1 tokens"]
    answer: Float[Tensor, "1 ..."]
    states: Sequence[Float[Tensor, "1 tokens width"]]
    """The input of each block."""
    in_tuples: bool
    """Whether blocks return tuples."""

    @staticmethod
    def of(original: Model, rows: Int[Tensor, "1 tokens"]) -> _Batch:
        """Run the original on a window and record its predictions and hidden states."""
        states: list[Tensor] = []
        outputs: list[Any] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args: states.append(args[0]))
            for block in original.blocks
        ]
        hooks.append(original.blocks[0].register_forward_hook(lambda _, args, output: outputs.append(output)))
        try:
            with torch.inference_mode():
                answer = original.answer(rows.to(original.device))
        finally:
            for hook in hooks:
                hook.remove()
        return _Batch(rows, answer, states, isinstance(outputs[0], tuple))

    def from_block(self, model: Model, index: int) -> float:
        """Return the divergence of a model that shares all blocks before this one with the original.

        Those blocks are not run again.
        """
        state = self.states[index]
        shared_blocks = [cast(Any, block) for block in list(model.blocks)[:index]]
        output = (state,) if self.in_tuples else state
        for block in shared_blocks:
            block.forward = lambda *_, **__: output
        try:
            return self.divergence(model)
        finally:
            for block in shared_blocks:
                del block.forward

    def divergence(self, model: Model) -> float:
        """Return the divergence of a model from the original."""
        with torch.inference_mode():
            return divergence(self.answer, model.answer(self.rows.to(model.device)), model.task)


def divergence(
    original: Float[Tensor, "*rows outputs"], changed: Float[Tensor, "*rows outputs"], task: Task
) -> float:
    """Return the mean of KL(original ‖ changed) over rows of logits.

    For a single output it is the squared difference, for embeddings 1 − cosine.
    """
    total, rows, changed_rows = 0.0, original.flatten(0, -2), changed.flatten(0, -2)
    for start in range(0, len(rows), _ROWS):
        expected = rows[start : start + _ROWS].float()
        actual = changed_rows[start : start + _ROWS].float()
        if task == "embedding":
            divergences = 1 - nn.functional.cosine_similarity(expected, actual, dim=-1)
        elif expected.shape[-1] == 1:
            divergences = (expected - actual).square()
        else:
            log = expected.log_softmax(dim=-1)
            divergences = (log.exp() * (log - actual.log_softmax(dim=-1))).sum(dim=-1)
        total += float(divergences.double().sum())
    return max(total / len(rows), 0.0)


@contextmanager
def _replaced(model: Model, name: str, part: nn.Module) -> Iterator[None]:
    """Replace a part of a model within the context."""
    original = model.module.get_submodule(name)
    model.replace(name, part)
    try:
        yield
    finally:
        model.replace(name, original)
