"""The shared part of searches by Optuna's samplers, and the only file that imports Optuna."""

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
from orchestrator.search.search import Choices, KnownMetrics, Result, Space


@dataclass(frozen=True)
class Draws:
    """The source of proposals."""

    sampler: BaseSampler
    first: int
    """Number of results before the sampler is used; choices are uniform until then."""
    tries: int
    """Maximum number of draws by the sampler per proposal. If all of them were proposed before or break a known limit,
    uniform draws follow, so that a converged sampler does not stall the study."""


def nsga2(population: int, seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=population, seed=seed)


def tpe(first: int, seed: int) -> BaseSampler:
    """Return a sampler of all knobs together, since techniques interact; Optuna's default treats knobs separately."""
    return TPESampler(n_startup_trials=first, multivariate=True, constant_liar=True, seed=seed)


def gp(first: int, seed: int) -> BaseSampler:
    return GPSampler(n_startup_trials=first, seed=seed)


class OptunaSearch:
    """The first proposals are uniform within the limits; later ones are drawn by an Optuna sampler.

    Choices that break a limit by known metrics are not proposed; limits of measured metrics are constraints of trials.
    Pending choices are running trials, so that samplers that consider these do not propose similar ones. Failures are
    not reported to the sampler.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[Objective],
        known_metrics: KnownMetrics,
        seed: int,
        draws: Draws,
    ) -> None:
        self._space = space
        self._proposals = Proposals(objectives, known_metrics)
        self._generator = np.random.default_rng(seed)
        self._draws = draws
        self._distributions = {knob: _distribution(domain) for knob, domain in space.items()}
        self._pending: dict[object, int] = {}
        self._complete = 0
        with _silence():
            self._study = optuna.create_study(
                directions=["minimize" if o.goal == "min" else "maximize" for o in objectives],
                sampler=draws.sampler,
            )

    def ask(self, n: int) -> list[dict[str, Value]]:
        proposals = []
        with _silence():
            for _ in range(n):
                for choices in self._proposals.draw(1, self._sample()):
                    self._pending[key(choices)] = self._add_running_trial(choices, {})
                    proposals.append(choices)
        return proposals

    def tell(self, results: Sequence[Result]) -> None:
        with _silence():
            for stopped, outcome in results:
                if outcome is None:
                    self._end_trial(stopped)
            for choices, metrics in self._proposals.new_results(results):
                self._end_trial(choices)
                # Results outside the space, which may be smaller in a resumed study, are ignored.
                if metrics is not None and self._inside(choices):
                    self._add_result(choices, metrics)

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        return [1.0] * len(pending)

    def _end_trial(self, choices: Choices) -> None:
        """End the running trial of these choices, if there is one."""
        if key(choices) in self._pending:
            self._study.tell(self._pending.pop(key(choices)), state=TrialState.FAIL)

    def _sample(self) -> Callable[[], dict[str, Value]]:
        """The draws of one proposal: first those of the sampler, if there are enough results, then uniform ones."""
        tries = self._draws.tries if self._complete >= self._draws.first else 0
        draws = itertools.count()

        def draw() -> dict[str, Value]:
            if next(draws) < tries:
                return self._draw_from_sampler()
            return uniform(self._space, self._generator)

        return draw

    def _draw_from_sampler(self) -> dict[str, Value]:
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return {knob: _decoded(self._space[knob], trial.params[knob]) for knob in self._space}

    def _inside(self, choices: Choices) -> bool:
        return choices.keys() == self._space.keys() and all(
            choices[knob] in domain for knob, domain in self._space.items()
        )

    def _add_running_trial(self, choices: Choices, constraints: dict[str, float]) -> int:
        """Add a running trial of these choices and return its number."""
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params={knob: _encoded(self._space[knob], choices[knob]) for knob in self._space},
                distributions=self._distributions,
                constraints=constraints,
            )
        )
        return len(self._study.get_trials(deepcopy=False)) - 1

    def _add_result(self, choices: Choices, metrics: Metrics) -> None:
        """Add the result as a new trial, since constraints cannot be added to an existing one."""
        objectives = self._proposals.objectives
        constraints = {
            objective.metric: _excess(objective, metrics)
            for objective in objectives
            if objective.limit is not None
        }
        number = self._add_running_trial(choices, constraints)
        if isinstance(self._draws.sampler, BaseGASampler):
            # A result joins the current generation when it is reported. Optuna would assign the generation at the next
            # draw, which depends on the number of pending choices and differs in a resumed study.
            self._draws.sampler.get_trial_generation(
                self._study, self._study.get_trials(deepcopy=False)[number]
            )
        self._study.tell(number, [metrics[objective.metric] for objective in objectives])
        self._complete += 1


def _excess(objective: Objective, metrics: Metrics) -> float:
    """The distance of the value beyond the limit, as a share of the limit; at most 0 if the limit is kept."""
    assert objective.limit is not None
    excess = objective.loss(metrics[objective.metric]) - objective.loss(objective.limit)
    return excess / (abs(objective.limit) or 1.0)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        # By index, since Optuna compares values with ==, and 1 == True.
        indices = range(len(domain.values))
        return IntDistribution(0, indices[-1]) if _ordered(domain) else CategoricalDistribution(indices)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _ordered(choice: Choice) -> bool:
    """Whether the values are numbers in ascending or descending order, so that neighbours are similar."""
    numbers = [
        value for value in choice.values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return len(numbers) == len(choice.values) and numbers in (sorted(numbers), sorted(numbers, reverse=True))


def _encoded(domain: Domain, value: Value) -> Value:
    if isinstance(domain, Choice):
        return next(index for index, choice in enumerate(domain.values) if value in Choice((choice,)))
    return domain.normal(value)


def _decoded(domain: Domain, value: Value) -> Value:
    return domain.values[int(value)] if isinstance(domain, Choice) else domain.normal(value)


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress Optuna's message per trial. The log level is global, so restore it afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
