"""Choose the candidates that a search begins with."""

from __future__ import annotations

from operator import itemgetter

from jobs.knobs import Value
from orchestrator.planning.candidates import KnownMetrics
from orchestrator.planning.layer_sensitivity import Allocations
from orchestrator.planning.prepared_study import PreparedStudy

MAX_INITIAL_POINTS = 8
"""Candidates. At most a quarter of all candidates are chosen here, so that the search keeps the others."""

_Sized = tuple[float, dict[str, Value]]
"""A size in bytes, and the choices that have it."""


def initial_design(prepared: PreparedStudy, known: KnownMetrics) -> list[dict[str, Value]]:
    """The first choices: where options differ by block, the best allocations of levels to blocks by their measured
    sensitivity; else, for the surrogate search alone, each technique by itself, which the surrogate would learn late
    or never."""
    limit = None
    for objective in prepared.plan.objectives:
        if objective.metric == "size_bytes":
            limit = objective.limit
    count = min(MAX_INITIAL_POINTS, prepared.config.search.candidates // 4)
    if prepared.levels is not None:
        return Allocations.of(prepared.space, prepared.levels, known.size_bytes).spread(limit, count)
    if prepared.config.search.algorithm != "surrogate":
        return []
    return _single_techniques(prepared, known, limit)[:count]


def _single_techniques(
    prepared: PreparedStudy, known: KnownMetrics, limit: float | None
) -> list[dict[str, Value]]:
    """Each technique that makes the model smaller, by itself: first its weakest settings within the limit, then its
    strongest; each group in order of size."""
    largest = float(prepared.plan.original_cost.size_bytes - 1)
    if limit is not None:
        largest = min(largest, limit)
    weakest: list[_Sized] = []
    strongest: list[_Sized] = []
    for corners in prepared.space.single_techniques():
        fitting: list[_Sized] = []
        for choices in corners:
            size = known.size_bytes(choices)
            if size is not None and size <= largest:
                fitting.append((size, choices))
        fitting.sort(key=itemgetter(0))
        if fitting and fitting[-1][0] > fitting[0][0]:
            weakest.append(fitting[-1])
        strongest += fitting[:1]
    ordered = [*sorted(weakest, key=itemgetter(0)), *sorted(strongest, key=itemgetter(0))]
    return [choices for _, choices in ordered]
