"""Searches by Optuna's samplers: what they share, and the only file that imports Optuna."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseGASampler, BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState, create_trial

from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Metrics, Objective
from orchestrator.search.proposals import Proposals, key, uniform
from orchestrator.search.search import Choices, Known, Result, Space


@dataclass(frozen=True)
class Draws:
    """Where proposals come from.

    first: results to wait for before the sampler is asked; until then choices are uniform.
    tries: draws by the sampler for one proposal. Where it keeps drawing what was seen or what breaks a known
        limit, uniform draws follow, lest a converged sampler stall the study.
    """

    sampler: BaseSampler
    first: int
    tries: int


def nsga2(population: int, seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=population, seed=seed)


def tpe(first: int, seed: int) -> BaseSampler:
    """All knobs together: techniques do more to each other than Optuna's default for several objectives allows for."""
    return TPESampler(n_startup_trials=first, multivariate=True, constant_liar=True, seed=seed)


def gp(first: int, seed: int) -> BaseSampler:
    return GPSampler(n_startup_trials=first, seed=seed)


class OptunaSearch:
    """The first proposals are uniform within the limits; later ones are drawn by the sampler from what was told.

    Limits on what is known keep choices from being proposed, limits on what was measured are Optuna's
    constraints. Outstanding choices are running trials, so a sampler that looks at these does not propose
    their neighbours meanwhile. Failures are left out: the samplers know no place for them.
    """

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known: Known, seed: int, draws: Draws
    ) -> None:
        self._space = space
        self._proposals = Proposals(objectives, known)
        self._generator = np.random.default_rng(seed)
        self._draws = draws
        self._distributions = {knob: _distribution(domain) for knob, domain in space.items()}
        self._outstanding: dict[object, int] = {}
        self._complete = 0
        with _silence():
            self._study = optuna.create_study(
                directions=["minimize" if o.goal == "min" else "maximize" for o in objectives],
                sampler=draws.sampler,
            )

    def ask(self, n: int) -> list[dict[str, Value]]:
        asked = []
        with _silence():
            for _ in range(n):
                for choices in self._proposals.draw(1, self._sample()):
                    self._outstanding[key(choices)] = self._enter(choices, {})
                    asked.append(choices)
        return asked

    def tell(self, results: Sequence[Result]) -> None:
        with _silence():
            for choices in (choices for choices, outcome in results if outcome is None):
                self._end(choices)
            for choices, metrics in self._proposals.news(results):
                self._end(choices)
                # A study may be resumed with a narrower space; what lies outside it cannot be learned from.
                if metrics is not None and self._inside(choices):
                    self._count(choices, metrics)

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        return [1.0] * len(awaited)

    def _end(self, choices: Choices) -> None:
        """These choices are outstanding no more."""
        if key(choices) in self._outstanding:
            self._study.tell(self._outstanding.pop(key(choices)), state=TrialState.FAIL)

    def _sample(self) -> Callable[[], dict[str, Value]]:
        """Draws for one proposal: the sampler's, once there is something to go by, then uniform ones."""
        tries = self._draws.tries if self._complete >= self._draws.first else 0
        drawn = itertools.count()
        return lambda: self._sampled() if next(drawn) < tries else uniform(self._space, self._generator)

    def _sampled(self) -> dict[str, Value]:
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return {knob: _decoded(self._space[knob], trial.params[knob]) for knob in self._space}

    def _inside(self, choices: Choices) -> bool:
        return choices.keys() == self._space.keys() and all(
            choices[knob] in domain for knob, domain in self._space.items()
        )

    def _enter(self, choices: Choices, constraints: dict[str, float]) -> int:
        """The number of a running trial of these choices."""
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params={knob: _encoded(self._space[knob], choices[knob]) for knob in self._space},
                distributions=self._distributions,
                constraints=constraints,
            )
        )
        return len(self._study.get_trials(deepcopy=False)) - 1

    def _count(self, choices: Choices, metrics: Metrics) -> None:
        """Enters the result as a trial of its own: what a trial was begun with cannot be told its constraints."""
        objectives = self._proposals.objectives
        number = self._enter(
            choices, {o.metric: _excess(o, metrics) for o in objectives if o.limit is not None}
        )
        if isinstance(self._draws.sampler, BaseGASampler):
            # A result joins the generation that is open when it is told. Optuna would decide that when it is
            # asked, but then a resumed study, and one with many asks outstanding, would breed otherwise.
            self._draws.sampler.get_trial_generation(
                self._study, self._study.get_trials(deepcopy=False)[number]
            )
        self._study.tell(number, [metrics[objective.metric] for objective in objectives])
        self._complete += 1


def _excess(objective: Objective, metrics: Metrics) -> float:
    """How far the value is beyond the limit, as a share of it; at most 0 where it is kept."""
    assert objective.limit is not None
    beyond = objective.loss(metrics[objective.metric]) - objective.loss(objective.limit)
    return beyond / (abs(objective.limit) or 1.0)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        # By position: Optuna compares values with ==, to which 1 and True are one.
        places = range(len(domain.values))
        return IntDistribution(0, places[-1]) if _ordered(domain) else CategoricalDistribution(places)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _ordered(choice: Choice) -> bool:
    """Whether neighbours among the values are alike: numbers in their order."""
    numbers = [
        value for value in choice.values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return len(numbers) == len(choice.values) and numbers in (sorted(numbers), sorted(numbers, reverse=True))


def _encoded(domain: Domain, value: Value) -> Value:
    if isinstance(domain, Choice):
        return next(place for place, known in enumerate(domain.values) if value in Choice((known,)))
    return domain.normal(value)


def _decoded(domain: Domain, value: Value) -> Value:
    return domain.values[int(value)] if isinstance(domain, Choice) else domain.normal(value)


@contextmanager
def _silence() -> Iterator[None]:
    """Optuna reports each trial on stderr, and its level is one for the whole process: put it back after."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
