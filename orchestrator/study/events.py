"""Events and commands: what a Study is told, and what it answers. Plain data; events are what the ledger keeps."""

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
    """What is known of a candidate before anything runs, from its layout alone.

    size_bytes: of the weights' file, exact. Where the data decide what each layer gets, a bound of the artifact, and
        an estimate of forms that hold its layers otherwise.
    decode_macs, linears: multiply-adds per token, and into how many layers they are divided: a model with
        no more of either, and no more bytes, is taken to be no slower.
    predicted: milliseconds by metric, by a table of operations; empty where there is none. They compare
        candidates, and are no measurements.
    """

    size_bytes: int
    decode_macs: int
    linears: int
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateProposed:
    """The search chose a candidate. `refused` tells why it can't be made at all, from shapes alone."""

    recipe: Recipe
    choices: Mapping[str, Value]
    cost: Cost | None
    refused: str | None = None


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
    """A process took the study up, new or where another left it: nothing is running. slots: how many jobs it can run
    at once; granted: what its budget allows, which may be more than was allowed before."""

    slots: int = 1
    granted: BudgetAllowance = field(default_factory=BudgetAllowance)


@dataclass(frozen=True)
class SlotsChanged:
    """Now so many jobs can run at once: a cluster could have more, or fewer, than was known before."""

    slots: int


@dataclass(frozen=True)
class AttemptStarted:
    """An attempt was handed to the executor."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class AttemptEnded:
    """What came of an attempt."""

    job_id: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True)
class SearchExhausted:
    """The search has nothing more to propose."""

    reason: str


@dataclass(frozen=True)
class CandidateStopped:
    """A candidate under way is given up: its chance to add to the front has become negligible."""

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
    """Hand this attempt to the executor. alone: with nothing else on its node, for a timing or after memory ran out."""

    job: Job
    attempt: int
    exclusive: bool


@dataclass(frozen=True)
class Cancel:
    """Nobody needs this attempt any more: end it, or forget it if it waits. What it left behind can go."""

    job: Job
    attempt: int


@dataclass(frozen=True)
class Tell:
    """Tell the search what came of its choices: a failure where they failed, None where they were given up.

    Timings that are not measured yet stand in it as estimates: they steer, and are reported nowhere.
    """

    choices: Mapping[str, Value]
    result: Mapping[str, float] | Failure | None


@dataclass(frozen=True)
class Record:
    """The candidate changed: mirror it to the tracker."""

    candidate: Candidate


Command = Run | Cancel | Tell | Record
Stage = Literal["searching", "racing", "timing", "done"]


@dataclass(frozen=True)
class StudyPlan:
    """What a study is to do, fixed when it starts.

    meters: taken of every candidate. timers: exclusive ones, taken in a row once the search has ended, of the
    original and of what may be on the front, so that a machine that drifts does so for all of them; of the
    original also at the start, which gives estimates their unit. timed: the objectives that the timers give.
    prediction_errors: by how much, relatively and by metric, predictions are expected to err.
    rungs: the shares of the evaluation that candidates are measured on, one after the other as long as they may be on
    the front; they rise, and the last is 1. The original is measured on all of it at once.
    """

    original: Recipe
    original_cost: Cost
    objectives: tuple[Objective, ...]
    candidates: int
    meters: tuple[str, ...]
    timers: tuple[str, ...]
    timed: frozenset[str]
    materials_digest: str
    prediction_errors: Mapping[str, float] = field(default_factory=dict)
    rungs: tuple[float, ...] = (1.0,)
