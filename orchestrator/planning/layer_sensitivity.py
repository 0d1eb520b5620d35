"""Levels: what is foretold of choices that differ by block, from what each level of each block does alone."""

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
_MOST = 64
"""So many uniform steps are compared with the original, at most: a space with more settings does without."""
_VALUES = 8
_SLACK = 0.005

Size = Callable[[Choices], float | None]
"""The bytes of what choices make; None where they make no model."""


@dataclass(frozen=True)
class Levels:
    """damages: of every uniform step, all blocks of which are on one level, by `_key`."""

    damages: Mapping[str, LayerSensitivity]

    def divergence(self, space: SearchSpace, choices: Choices) -> float | None:
        """The sum of what each block, and what is not in blocks, does alone: how far the predictions are taken to be
        from the original's. None where a stage takes a technique of which it is not known; what stages do that never
        differ by block is left out."""
        total = 0.0
        for stage, options in space.stages.items():
            if choices[stage] == SKIP or not any(option.spread for option in options):
                continue
            option = next(one for one in options if one.technique.name() == choices[stage])
            prefix = f"{stage}.{option.technique.name()}."
            chosen = {knob: choices[prefix + knob] for knob in option.knobs()}
            alone = self._alone(option, chosen) if option.spread else None
            if alone is None:
                return None
            total += alone
        return total

    def _alone(self, option: Option, chosen: Choices) -> float | None:
        count = len(next(iter(self.damages.values())).parts)
        others = {name: chosen[name] for name in option.searched}
        found: dict[tuple[Value, ...], LayerSensitivity | None] = {}
        total, rest = 0.0, 0.0
        for part in range(count):
            level = tuple(chosen[f"{name}.{part * one.runs // count}"] for name, one in option.spread.items())
            if level not in found:
                found[level] = self.damages.get(
                    _key(option, {**others, **dict(zip(option.spread, level, strict=True))})
                )
            damage = found[level]
            if damage is None:
                return None
            total, rest = total + damage.parts[part], damage.rest
        return total + rest


def uniform_steps(space: SearchSpace) -> dict[str, Technique]:
    """Every step with all blocks on one level, of the techniques that differ by block; none of a technique some of
    whose options are searched over too many values to try them all."""
    found: dict[str, Technique] = {}
    for option in space.options():
        domains = {**option.searched, **{name: one.domain for name, one in option.spread.items()}}
        every = {name: _values(domain) for name, domain in domains.items()}
        if not option.spread or not all(every.values()) or math.prod(map(len, every.values())) > _MOST:
            continue
        for values in itertools.product(*every.values()):
            options = dict(zip(every, values, strict=True))
            step = option.technique.of({**option.fixed, **options})
            if not step.is_noop:
                found[_key(option, options)] = step
    return found


@dataclass(frozen=True)
class Allocations:
    """Choices of the least divergence that is foretold within a size: the exact solution of a knapsack of blocks, whose
    other knobs take each of their values in turn. Other stages are skipped."""

    space: SearchSpace
    levels: Levels
    size: Size
    settings: tuple[_Setting, ...]

    @staticmethod
    def of(space: SearchSpace, levels: Levels, size: Size) -> Allocations:
        found = (one for stage in space.stages for one in _settings(space, stage, levels, size))
        return Allocations(space, levels, size, tuple(found))

    def within(self, budget: int) -> dict[str, Value] | None:
        """The best of at most so many bytes; None where none is."""
        solved = [one.solved(budget, self.size) for one in self.settings if one.least <= budget]
        fitting = [choices for choices in solved if choices is not None]
        return min(fitting, key=lambda one: self.levels.divergence(self.space, one) or 0.0, default=None)

    def spread(self, limit: float | None, count: int) -> list[dict[str, Value]]:
        """For so many sizes from the smallest to the largest that can be or is allowed, both left out; each once."""
        if not self.settings or count < 1:
            return []
        lowest, highest = (
            min(one.least for one in self.settings),
            max(one.most for one in self.settings),
        )
        highest = highest if limit is None else min(highest, int(limit))
        found: list[dict[str, Value]] = []
        for budget in np.linspace(lowest, highest, count + 2)[1:-1]:
            best = self.within(int(budget))
            if best is not None and best not in found:
                found.append(best)
        return found


@dataclass(frozen=True)
class _Setting:
    """All but the levels: a technique and its options that are one for all blocks.

    costs: by run and value, the bytes beyond `fixed`, the part that is the same at any levels; errors: divergences.
    """

    choices: Choices
    runs: tuple[str, ...]
    values: tuple[Value, ...]
    costs: torch.Tensor
    errors: torch.Tensor
    fixed: int

    @property
    def least(self) -> int:
        return self.fixed + int(self.costs.amin(dim=1).sum())

    @property
    def most(self) -> int:
        return self.fixed + int(self.costs.amax(dim=1).sum())

    def solved(self, budget: int, size: Size) -> dict[str, Value] | None:
        """The best within a budget. Costs leave out a few bytes of a file's header, and the knapsack rounds them up, so
        more than the budget is asked for first, lest what just fits is missed."""
        left, step = round(budget * (1 + _SLACK)), max(round(budget * _SLACK / 8), 1)
        while left >= self.least:
            taken = least_error(self.costs, self.errors, left - self.fixed)
            choices = {
                **self.choices,
                **{run: self.values[at] for run, at in zip(self.runs, taken, strict=True)},
            }
            if (size(choices) or math.inf) <= budget:
                return choices
            left -= step
        return None


def _settings(space: SearchSpace, stage: str, levels: Levels, size: Size) -> Iterator[_Setting]:
    for option in space.stages[stage]:
        if len(option.spread) != 1:
            continue
        prefix = f"{stage}.{option.technique.name()}."
        (name, spread), others = (
            next(iter(option.spread.items())),
            [_values(d) for d in option.searched.values()],
        )
        values, runs = _values(spread.domain), tuple(f"{prefix}{name}.{run}" for run in range(spread.runs))
        for picked in itertools.product(*others):
            start = {**_skipping(space), stage: option.technique.name(), **dict.fromkeys(runs, values[0])}
            start |= {prefix + knob: value for knob, value in zip(option.searched, picked, strict=True)}
            made, alone = size(start), levels.divergence(space, start)
            if made is None or alone is None:
                continue
            bytes_, errors = np.zeros((len(runs), len(values))), np.zeros((len(runs), len(values)))
            for row, run in enumerate(runs):
                for column, value in enumerate(values):
                    bytes_[row, column] = (size({**start, run: value}) or math.inf) - made
                    errors[row, column] = (levels.divergence(space, {**start, run: value}) or 0.0) - alone
            if not np.isfinite(bytes_).all():
                continue
            cheapest = bytes_.min(axis=1, keepdims=True)
            costs = torch.tensor(bytes_ - cheapest).long()
            yield _Setting(start, runs, values, costs, torch.tensor(errors), int(made + cheapest.sum()))


def _skipping(space: SearchSpace) -> dict[str, Value]:
    """Choices that skip every stage, all other knobs at some value."""
    found: dict[str, Value] = {}
    for name, domain in space.knobs().items():
        found[name] = domain.values[0] if isinstance(domain, Choice) else domain.normal(domain.low)
    return {**found, **dict.fromkeys(space.stages, SKIP)}


def _values(domain: Domain) -> tuple[Value, ...]:
    """All values of a domain; none where they are many."""
    if isinstance(domain, Choice):
        return domain.values
    if not domain.integer or domain.high - domain.low >= _VALUES:
        return ()
    return tuple(range(math.ceil(domain.low), math.floor(domain.high) + 1))


def _key(option: Option, options: Choices) -> str:
    return json.dumps([option.technique.name(), {**option.fixed, **options}], sort_keys=True)
