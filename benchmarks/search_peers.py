"""Searches of other libraries with their default options; they measure every objective.

They do not receive the metrics known before execution, nor the conditions of conditional knobs. Numeric knobs are
ordered for them too. A limit becomes a constraint where the library supports constraints, and a repeated proposal
counts again. syne-tune's regularized evolution supports no constraints; its EHVI needs botorch and is excluded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import optuna

from benchmarks.search_problems import Problem
from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Metrics, losses

CURE = "pip install 'slimfront[bench]'"


class Peer(Protocol):
    """A search that proposes one choice at a time and receives its metrics before the next proposal."""

    def ask(self) -> dict[str, Value] | None:
        """Return the next choice, or None when all choices were proposed."""
        ...

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None: ...


def make(name: str, problem: Problem, seed: int) -> Peer:
    """Return a new search; raise ModuleNotFoundError if its library is not installed."""
    return PEERS[name](problem, seed)


def _ordered(domain: Domain) -> bool:
    return not isinstance(domain, Choice) or domain.ordered


def _bounds(domain: Domain) -> tuple[int, int]:
    """Return the bounds of an integer, or of the index of an ordered choice."""
    if isinstance(domain, Choice):
        return 0, len(domain.values) - 1
    return int(domain.low), int(domain.high)


def _decoded(space: Mapping[str, Domain], values: Mapping[str, Any]) -> dict[str, Value]:
    """Return the choice of a library's values, in which ordered choices are indices."""
    choices: dict[str, Value] = {}
    for knob, domain in space.items():
        if isinstance(domain, Choice) and _ordered(domain):
            choices[knob] = domain.values[int(values[knob])]
        else:
            choices[knob] = domain.normal(values[knob])
    return choices


def _excesses(problem: Problem, metrics: Metrics) -> list[float]:
    """Return the relative excess over each limit; at most 0 where the limit is respected."""
    return [
        (o.loss(metrics[o.metric]) - o.loss(o.limit)) / abs(o.limit)
        for o in problem.objectives
        if o.limit is not None
    ]


class _Optuna:
    def __init__(self, problem: Problem, sampler: optuna.samplers.BaseSampler) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._problem = problem
        self._study = optuna.create_study(
            directions=[f"{objective.goal}imize" for objective in problem.objectives],
            sampler=sampler,
        )
        self._distributions = {knob: self._distribution(domain) for knob, domain in problem.space.items()}

    def ask(self) -> dict[str, Value]:
        self._trial = self._study.ask(self._distributions)
        return _decoded(self._problem.space, self._trial.params)

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None:
        for index, excess in enumerate(_excesses(self._problem, metrics)):
            self._trial.set_constraint(str(index), excess)
        self._study.tell(self._trial, [metrics[o.metric] for o in self._problem.objectives])

    @staticmethod
    def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
        if isinstance(domain, Choice) and not _ordered(domain):
            return optuna.distributions.CategoricalDistribution(domain.values)
        if isinstance(domain, Choice) or domain.integer:
            log = not isinstance(domain, Choice) and domain.log
            return optuna.distributions.IntDistribution(*_bounds(domain), log=log)
        return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


class _Pymoo:
    """NSGA-II with pymoo's operators for mixed variables. It has no logarithmic scale, so it receives exponents."""

    def __init__(self, problem: Problem, seed: int) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core import mixed
        from pymoo.core.problem import Problem as PymooProblem

        self._problem = problem
        pymoo_problem = PymooProblem(
            vars={knob: self._variable(domain) for knob, domain in problem.space.items()},
            n_obj=len(problem.objectives),
            n_ieq_constr=sum(o.limit is not None for o in problem.objectives),
        )
        duplicates = mixed.MixedVariableDuplicateElimination()
        self._algorithm = NSGA2(
            sampling=mixed.MixedVariableSampling(),
            mating=mixed.MixedVariableMating(eliminate_duplicates=duplicates),
            eliminate_duplicates=duplicates,
        )
        self._algorithm.setup(pymoo_problem, termination=("n_gen", 10**9), seed=seed, verbose=False)
        self._generation: Any = ()
        self._results: list[Metrics] = []

    def ask(self) -> dict[str, Value]:
        if len(self._results) == len(self._generation):
            self._generation, self._results = self._algorithm.ask(), []
        values = self._generation[len(self._results)].X
        exponents = {
            knob: 10.0 ** values[knob]
            for knob, domain in self._problem.space.items()
            if not isinstance(domain, Choice) and domain.log
        }
        for knob, value in exponents.items():
            domain = self._problem.space[knob]
            assert not isinstance(domain, Choice)
            if domain.integer:
                value = round(value)
            exponents[knob] = min(max(value, domain.low), domain.high)
        return _decoded(self._problem.space, {**values, **exponents})

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None:
        self._results.append(metrics)
        if len(self._results) == len(self._generation):
            objectives = self._problem.objectives
            self._generation.set("F", np.array([losses(metrics, objectives) for metrics in self._results]))
            excesses = [_excesses(self._problem, metrics) for metrics in self._results]
            self._generation.set("G", np.array(excesses))
            for individual in self._generation:
                individual.evaluated = {"F", "G", "H"}
            self._algorithm.tell(infills=self._generation)

    @staticmethod
    def _variable(domain: Domain) -> Any:
        from pymoo.core.variable import Choice as Letters
        from pymoo.core.variable import Integer, Real

        if isinstance(domain, Choice) and not _ordered(domain):
            return Letters(options=list(domain.values))
        if not isinstance(domain, Choice) and domain.log:
            return Real(bounds=(np.log10(domain.low), np.log10(domain.high)))
        if isinstance(domain, Choice) or domain.integer:
            return Integer(bounds=_bounds(domain))
        return Real(bounds=(domain.low, domain.high))


class _Syne:
    """syne-tune's multi-objective regularized evolution."""

    def __init__(self, problem: Problem, seed: int) -> None:
        logging.getLogger("syne_tune").setLevel(logging.ERROR)
        from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution

        self._problem = problem
        space = {knob: self._library_domain(domain) for knob, domain in problem.space.items()}
        self._search = MultiObjectiveRegularizedEvolution(space, random_seed=seed)
        self._completed = 0

    def ask(self) -> dict[str, Value]:
        self._suggestion = self._search.suggest()
        return _decoded(self._problem.space, self._suggestion)

    def tell(self, choices: dict[str, Value], metrics: Metrics) -> None:
        self._search.on_trial_complete(
            self._completed, self._suggestion, list(losses(metrics, self._problem.objectives))
        )
        self._completed += 1

    @staticmethod
    def _library_domain(domain: Domain) -> Any:
        from syne_tune import config_space

        if isinstance(domain, Choice) and not _ordered(domain):
            return config_space.choice(list(domain.values))
        if isinstance(domain, Choice):
            return config_space.randint(*_bounds(domain))
        if domain.integer:
            if domain.log:
                return config_space.lograndint(*_bounds(domain))
            return config_space.randint(*_bounds(domain))
        if domain.log:
            return config_space.loguniform(domain.low, domain.high)
        return config_space.uniform(domain.low, domain.high)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, seed=seed)


PEERS: Mapping[str, Callable[[Problem, int], Peer]] = {
    "optuna-nsga2": lambda problem, seed: _Optuna(problem, optuna.samplers.NSGAIISampler(seed=seed)),
    "optuna-tpe": lambda problem, seed: _Optuna(problem, _tpe(seed)),
    "optuna-gp": lambda problem, seed: _Optuna(problem, optuna.samplers.GPSampler(seed=seed)),
    "pymoo-nsga2": _Pymoo,
    "syne-rea": _Syne,
}
