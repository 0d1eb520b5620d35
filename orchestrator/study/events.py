"""Events, the input of a study, and commands, its output. Plain data; the ledger stores the events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jobs.job import Failure, Job, Outcome
from jobs.knobs import Value
from jobs.recipe import Recipe
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate


@dataclass(frozen=True)
class Cost:
    """The properties of a candidate that follow from its layout, before execution.

    A model with no more multiply-adds, layers and bytes than another one is assumed to be no slower.
    """

    size_bytes: int
    """Size of the weights' file, exact. An upper bound of the artifact if the data decide the format of each layer;
    an estimate for formats that store layers differently."""
    decode_macs: int
    """Multiply-adds per decoded token."""
    linears: int
    """Number of linear layers that these multiply-adds are divided into."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds by metric, predicted by a latency table; empty without a table. They compare candidates and are no
    measurements."""


@dataclass(frozen=True)
class CandidateProposed:
    """The search proposed a candidate."""

    recipe: Recipe
    choices: Mapping[str, Value]
    cost: Cost | None
    refused: str | None = None
    """The reason why the recipe cannot be applied, known from shapes alone."""


@dataclass(frozen=True)
class BudgetAllowance:
    """The work that the budget allows from now on."""

    work: Literal["all", "finish_pending", "none"] = "all"
    """`finish_pending`: no new candidates, only the jobs that existing candidates still need. `none`: running jobs
    may end, and no job starts."""
    reason: str | None = None
    """Why less than all work is allowed."""


@dataclass(frozen=True)
class ServiceStarted:
    """A process starts or resumes the study; no job is running."""

    slots: int = 1
    """Number of jobs that can run at the same time."""
    granted: BudgetAllowance = field(default_factory=BudgetAllowance)
    """The work that the budget allows, which may be more than before."""


@dataclass(frozen=True)
class SlotsChanged:
    """The number of jobs that can run at the same time changed, for instance since the cluster grew."""

    slots: int


@dataclass(frozen=True)
class AttemptStarted:
    """The executor accepted an attempt."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class AttemptEnded:
    """An attempt succeeded or failed."""

    job_id: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True)
class SearchExhausted:
    """The search has no more candidates to propose."""

    reason: str


@dataclass(frozen=True)
class CandidateStopped:
    """An open candidate is given up, since the probability that it improves the front has become negligible."""

    id: str
    reason: str


Event = (
    ServiceStarted
    | BudgetAllowance
    | SlotsChanged
    | CandidateProposed
    | AttemptStarted
    | AttemptEnded
    | SearchExhausted
    | CandidateStopped
)


@dataclass(frozen=True)
class Run:
    """Submit this attempt to the executor."""

    job: Job
    attempt: int
    exclusive: bool
    """No other job may run on its node: for timings, and after an attempt that ran out of memory."""


@dataclass(frozen=True)
class Cancel:
    """Stop this attempt, or remove it from the queue; its leftovers can be deleted."""

    job: Job
    attempt: int


@dataclass(frozen=True)
class Tell:
    """Report the result of these choices to the search."""

    choices: Mapping[str, Value]
    result: Mapping[str, float] | Failure | None
    """None: the candidate was stopped. Metrics that are timed later are estimates, which are reported to the search
    only."""


@dataclass(frozen=True)
class Record:
    """Report the changed candidate to the tracker."""

    candidate: Candidate


Command = Run | Cancel | Tell | Record
Stage = Literal["searching", "racing", "timing", "done"]


@dataclass(frozen=True)
class StudyPlan:
    """The task of a study, fixed when it starts."""

    original: Recipe
    original_cost: Cost
    objectives: tuple[Objective, ...]
    candidates: int
    """Number of candidates to propose."""
    meters: tuple[str, ...]
    """Meters of every candidate."""
    timers: tuple[str, ...]
    """Exclusive meters. At the end of the study they time the original and the candidates that may be on the front in a
    row, so that a machine whose speed drifts does so for all of them. The original is also timed at the start, as the
    reference of all estimates."""
    timed: frozenset[str]
    """The objectives that the timers measure."""
    materials_digest: str
    prediction_errors: Mapping[str, float] = field(default_factory=dict)
    """Expected relative errors of predictions, by metric."""
    rungs: tuple[float, ...] = (1.0,)
    """The shares of the evaluation, in ascending order up to 1. Candidates are measured on the first one and promoted
    while they may be on the front. The original is measured on the full evaluation at once."""
