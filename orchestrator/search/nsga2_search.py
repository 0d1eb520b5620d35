"""NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017) by Optuna; the only file that imports it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from jobs.knobs import Choice, Domain, Value
from orchestrator.front import Metrics, Objective
from orchestrator.search import Choices, Known, Result, Space
from orchestrator.search.proposals import Proposals, uniform

POPULATION = 20
"""Small against the usual 50 to 100: an evaluation costs minutes, and a study has some hundred of them."""

CHILDREN = 100
"""Draws from the population before a proposal turns to uniform ones, lest a converged population stall it."""


class Nsga2Search:
    """The first generation is uniform within the limits; later ones are bred from what was told.

    Limits on what is known keep choices from being proposed, limits on what was measured are Optuna's
    constraints: a choice that breaks one ranks behind all that keep it.

    A result joins the generation that is open when it is told. Optuna would decide that when it is asked,
    but then a resumed study, and one with many asks outstanding, would breed otherwise than this one.
    """

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        self._space = space
        self._proposals = Proposals(objectives, known)
        self._generator = np.random.default_rng(seed)
        self._distributions = {knob: _distribution(domain) for knob, domain in space.items()}
        self._complete = 0
        self._genetics = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
        with _silence():
            self._study = optuna.create_study(
                directions=["minimize" if o.goal == "min" else "maximize" for o in objectives],
                sampler=self._genetics,
            )

    def ask(self, n: int) -> list[dict[str, Value]]:
        with _silence():
            return [choices for _ in range(n) for choices in self._proposals.draw(1, self._sampler())]

    def tell(self, results: Sequence[Result]) -> None:
        with _silence():
            for choices, metrics in self._proposals.news(results):
                inside = choices.keys() == self._space.keys() and all(
                    choices[knob] in domain for knob, domain in self._space.items()
                )
                # A study may be resumed with a narrower space; what lies outside it cannot be bred from.
                if metrics is not None and inside:
                    self._count(choices, metrics)

    def _sampler(self) -> Callable[[], dict[str, Value]]:
        """Draws for one proposal: children, once there are parents, then uniform ones."""
        children = CHILDREN if self._complete >= POPULATION else 0
        draws = itertools.count()

        def draw() -> dict[str, Value]:
            return self._child() if next(draws) < children else uniform(self._space, self._generator)

        return draw

    def _child(self) -> dict[str, Value]:
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return {knob: _decoded(self._space[knob], trial.params[knob]) for knob in self._space}

    def _count(self, choices: Choices, metrics: Metrics) -> None:
        self._study.enqueue_trial({knob: _encoded(self._space[knob], choices[knob]) for knob in self._space})
        trial = self._study.ask(self._distributions)
        # Optuna gives a trial its generation when it breeds it, so one that was entered would have none.
        self._genetics.get_trial_generation(self._study, self._study.get_trials(deepcopy=False)[trial.number])
        for objective in self._proposals.objectives:
            if objective.limit is not None:
                excess = objective.loss(metrics[objective.metric]) - objective.loss(objective.limit)
                trial.set_constraint(objective.metric, excess / (abs(objective.limit) or 1.0))
        self._study.tell(trial, [metrics[objective.metric] for objective in self._proposals.objectives])
        self._complete += 1


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        # By position: Optuna compares values with ==, to which 1 and True are one.
        return CategoricalDistribution(range(len(domain.values)))
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


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
