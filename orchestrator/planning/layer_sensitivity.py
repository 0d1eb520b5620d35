"""Predict the divergence of choices that differ by block, from the measured sensitivity of each block alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from jobs.compression.knapsack import least_error
from jobs.knobs import Choice, Domain, Value
from jobs.prediction.layer_sensitivity import LayerSensitivity
from jobs.technique import Technique
from orchestrator.planning.search_space import SKIP, Choices, Option, SearchSpace

PREDICTED_KL = "predicted_kl"
"""The name of the predicted metric, in nats per token."""
_MAX_STEPS = 64
"""Uniform steps that are compared with the original, at most. A space with more settings gets no prediction."""
_MAX_VALUES = 8
"""Values of an integer option, at most, that are all tried."""
_SLACK = 0.005
"""The share of a budget by which the knapsack may exceed it at first: its costs leave out a few bytes of each file's
header, and it rounds them up, so that the exact budget would miss allocations that just fit."""
_SLACK_STEPS = 8
"""The slack is reduced in steps of this part of it."""

Size = Callable[[Choices], float | None]
"""The bytes of the model that choices make; None if they make none."""


@dataclass(frozen=True)
class Levels:
    """The sensitivities that were measured before the search."""

    damages: Mapping[str, LayerSensitivity]
    """Of every uniform step, in which all blocks have the same level, by `_key`."""

    def divergence(self, space: SearchSpace, choices: Choices) -> float | None:
        """The predicted divergence of the model's predictions from the original's: the sum of the divergences that each
        block, and the part outside of blocks, causes alone.

        None if a stage takes a technique without measured sensitivities. Stages whose options never differ by block
        are left out.
        """
        total = 0.0
        for stage, options in space.stages.items():
            if choices[stage] == SKIP or not any(option.per_part for option in options):
                continue
            option = _chosen_option(options, choices[stage])
            if not option.per_part:
                return None
            prefix = f"{stage}.{option.technique.name()}."
            values = {knob: choices[prefix + knob] for knob in option.knobs()}
            divergence = self._of_stage(option, values)
            if divergence is None:
                return None
            total += divergence
        return total

    def _of_stage(self, option: Option, values: Choices) -> float | None:
        """The divergence of one stage. values: of the option's knobs, by their names within it."""
        part_count = len(next(iter(self.damages.values())).parts)
        uniform = {name: values[name] for name in option.searched}
        by_level: dict[tuple[Value, ...], LayerSensitivity | None] = {}
        total, outside = 0.0, 0.0
        for part in range(part_count):
            level = tuple(
                values[f"{name}.{part * knobs.runs // part_count}"] for name, knobs in option.per_part.items()
            )
            if level not in by_level:
                options = {**uniform, **dict(zip(option.per_part, level, strict=True))}
                by_level[level] = self.damages.get(_key(option, options))
            sensitivity = by_level[level]
            if sensitivity is None:
                return None
            total += sensitivity.parts[part]
            outside = sensitivity.rest
        return total + outside


def uniform_steps(space: SearchSpace) -> dict[str, Technique]:
    """Every step in which all blocks have the same level, by `_key`, of the techniques whose options differ by block.
    Techniques with too many values to try are left out."""
    steps: dict[str, Technique] = {}
    for option in space.options():
        if not option.per_part:
            continue
        values = {name: _values(domain) for name, domain in option.searched.items()}
        values |= {name: _values(knobs.domain) for name, knobs in option.per_part.items()}
        count = math.prod(len(option_values) for option_values in values.values())
        if not 0 < count <= _MAX_STEPS:
            continue
        for combination in itertools.product(*values.values()):
            options = dict(zip(values, combination, strict=True))
            step = option.technique.of({**option.fixed, **options})
            if not step.is_noop:
                steps[_key(option, options)] = step
    return steps


@dataclass(frozen=True)
class Allocations:
    """The allocations of levels to blocks with the least predicted divergence within a size.

    Each is the exact solution of a knapsack problem over blocks; options that are the same for all blocks take each
    of their values in turn, and all other stages are skipped.
    """

    space: SearchSpace
    levels: Levels
    size: Size
    settings: tuple[_Setting, ...]

    @staticmethod
    def of(space: SearchSpace, levels: Levels, size: Size) -> Allocations:
        settings: list[_Setting] = []
        for stage in space.stages:
            settings += _settings(space, stage, levels, size)
        return Allocations(space, levels, size, tuple(settings))

    def within(self, budget: int) -> dict[str, Value] | None:
        """The best allocation of at most `budget` bytes; None if none fits."""
        best, least = None, math.inf
        for setting in self.settings:
            choices = None
            if setting.least <= budget:
                choices = setting.solved(budget, self.size)
            if choices is None:
                continue
            divergence = self.levels.divergence(self.space, choices) or 0.0
            if best is None or divergence < least:
                best, least = choices, divergence
        return best

    def spread(self, limit: float | None, count: int) -> list[dict[str, Value]]:
        """The best allocations for `count` sizes between the smallest and the largest that is possible, or allowed by
        the limit; both ends are left out, and equal allocations appear once."""
        if not self.settings or count < 1:
            return []
        lowest = min(setting.least for setting in self.settings)
        highest = max(setting.most for setting in self.settings)
        if limit is not None:
            highest = min(highest, int(limit))
        allocations: list[dict[str, Value]] = []
        for budget in np.linspace(lowest, highest, count + 2)[1:-1]:
            best = self.within(int(budget))
            if best is not None and best not in allocations:
                allocations.append(best)
        return allocations


@dataclass(frozen=True)
class _Setting:
    """A technique with values for the options that are the same for all blocks: the levels are free."""

    choices: Choices
    runs: tuple[str, ...]
    """The knobs of the levels, one for each run of blocks."""
    values: tuple[Value, ...]
    """The levels."""
    costs: torch.Tensor
    """Bytes beyond `fixed`, of shape (runs, values)."""
    errors: torch.Tensor
    """Divergences beyond those of the first level, of shape (runs, values)."""
    fixed: int
    """Bytes of the smallest model of this setting."""

    @property
    def least(self) -> int:
        return self.fixed + int(self.costs.amin(dim=1).sum())

    @property
    def most(self) -> int:
        return self.fixed + int(self.costs.amax(dim=1).sum())

    def solved(self, budget: int, size: Size) -> dict[str, Value] | None:
        """The best choices within a budget in bytes; None if there are none (see `_SLACK`)."""
        allowed = round(budget * (1 + _SLACK))
        step = max(round(budget * _SLACK / _SLACK_STEPS), 1)
        while allowed >= self.least:
            picked = least_error(self.costs, self.errors, allowed - self.fixed)
            levels = {run: self.values[index] for run, index in zip(self.runs, picked, strict=True)}
            choices = {**self.choices, **levels}
            if (size(choices) or math.inf) <= budget:
                return choices
            allowed -= step
        return None


def _settings(space: SearchSpace, stage: str, levels: Levels, size: Size) -> Iterator[_Setting]:
    """The settings of a stage, of the techniques with exactly one option that differs by block."""
    for option in space.stages[stage]:
        if len(option.per_part) != 1:
            continue
        ((name, knobs),) = option.per_part.items()
        prefix = f"{stage}.{option.technique.name()}."
        runs = tuple(prefix + knob for knob in knobs.names(name))
        values = _values(knobs.domain)
        if not values:
            continue
        uniform = [_values(domain) for domain in option.searched.values()]
        for combination in itertools.product(*uniform):
            choices = {**_skipping(space), stage: option.technique.name(), **dict.fromkeys(runs, values[0])}
            for knob, value in zip(option.searched, combination, strict=True):
                choices[prefix + knob] = value
            setting = _setting(space, levels, size, choices, runs, values)
            if setting is not None:
                yield setting


def _setting(
    space: SearchSpace,
    levels: Levels,
    size: Size,
    choices: Choices,
    runs: tuple[str, ...],
    values: tuple[Value, ...],
) -> _Setting | None:
    """The setting of these choices, in which every run has the first level. None if the size or the divergence of some
    level is unknown."""
    first_bytes, first_divergence = size(choices), levels.divergence(space, choices)
    if first_bytes is None or first_divergence is None:
        return None
    added_bytes = np.zeros((len(runs), len(values)))
    errors = np.zeros((len(runs), len(values)))
    for row, run in enumerate(runs):
        for column, value in enumerate(values):
            changed = {**choices, run: value}
            added_bytes[row, column] = (size(changed) or math.inf) - first_bytes
            errors[row, column] = (levels.divergence(space, changed) or 0.0) - first_divergence
    if not np.isfinite(added_bytes).all():
        return None
    cheapest = added_bytes.min(axis=1, keepdims=True)
    costs = torch.tensor(added_bytes - cheapest).long()
    return _Setting(choices, runs, values, costs, torch.tensor(errors), int(first_bytes + cheapest.sum()))


def _chosen_option(options: tuple[Option, ...], name: Value) -> Option:
    for option in options:
        if option.technique.name() == name:
            return option
    raise LookupError(f"there is no technique {name} in this stage")


def _skipping(space: SearchSpace) -> dict[str, Value]:
    """Choices that skip every stage; all other knobs have some value."""
    choices: dict[str, Value] = {}
    for name, domain in space.knobs().items():
        if isinstance(domain, Choice):
            choices[name] = domain.values[0]
        else:
            choices[name] = domain.normal(domain.low)
    return {**choices, **dict.fromkeys(space.stages, SKIP)}


def _values(domain: Domain) -> tuple[Value, ...]:
    """All values of a domain; none if they are continuous or too many."""
    if isinstance(domain, Choice):
        return domain.values
    if not domain.integer or domain.high - domain.low >= _MAX_VALUES:
        return ()
    return tuple(range(math.ceil(domain.low), math.floor(domain.high) + 1))


def _key(option: Option, options: Choices) -> str:
    """The key of a uniform step. It is stored in ledgers."""
    return json.dumps([option.technique.name(), {**option.fixed, **options}], sort_keys=True)
