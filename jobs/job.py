"""Job: one step from one parent, and what came of it. Plain data that crosses processes; needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.families import Task
from jobs.recipe import Recipe

FailureKind = Literal["invalid", "diverged", "out_of_memory", "disk_full", "preempted", "timeout", "bug"]


@dataclass(frozen=True)
class Target:
    """What the model is to run on. Latency is measured for prompts of `prompt_tokens`, then `new_tokens`.
    price_per_hour: of such a machine, in any currency."""

    runtime: str = "torch"
    threads: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    price_per_hour: float | None = None


@dataclass(frozen=True)
class TextSource:
    """Text to read: a .txt or .jsonl file (field `text`), a folder of them, or `package:MODULE`.

    part: from which to which share of the documents, in order, so that one source can serve several uses.
    where: keep only jsonl documents whose fields have these values.
    samples, tokens: the number of windows and the length of each, in tokens.
    """

    path: str
    samples: int
    tokens: int
    part: tuple[float, float] = (0.0, 1.0)
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSource:
    """Tasks of lm-eval, each `name` or `name:metric`. folder: of task files that lm-eval does not have itself; items:
    how many of each are read, all without it; shots: solved examples before each, the task's own number without it.
    """

    names: tuple[str, ...]
    folder: str | None = None
    items: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Materials:
    """What every job of a study shares: the original, the texts, the target.

    choices: a jsonl file of multiple-choice items (context, choices, answer), or None.
    labelled: a jsonl file of texts to classify (text, label), or None.
    """

    model: str
    task: Task
    evaluation: TextSource | None = None
    calibration: TextSource | None = None
    training: TextSource | None = None
    choices: str | None = None
    labelled: str | None = None
    tasks: TaskSource | None = None
    target: Target = Target()

    @property
    def new_tokens(self) -> int:
        """How many tokens a model makes one by one after each prompt: none where it is no causal one."""
        return self.target.new_tokens if self.task == "causal-lm" else 0


@dataclass(frozen=True)
class Measurement:
    """Numbers that were measured on an artifact, none of them NaN or infinite.

    metrics, errors: by metric name; an error is a standard error, for timings the spread (see the meter).
    unreliable: metrics that were too noisy to compare, which keeps them off the front.
    items: by metric, what each item of the evaluation (a window, a question, a text) adds to it, in the order of the
    data: their mean is the metric, and two artifacts are compared item by item.
    environment: where it was measured; numbers of different environments are not compared.
    seconds: how long measuring took.
    observed: by name, what was seen of each item where no metric is the plain mean of that (losses, answers). With the
    items of those that are, all that a longer measurement needs to know of these items; kept in the store alone.
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    unreliable: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {**self.metrics, **self.errors}.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} came out as {value}: the model diverged")

    def joined(self, other: Measurement) -> Measurement:
        """Both measurements of one artifact as one; the other's numbers win."""
        return Measurement(
            {**self.metrics, **other.metrics},
            {**self.errors, **other.errors},
            tuple(sorted({*self.unreliable} - {*other.metrics} | {*other.unreliable})),
            {**self.environment, **other.environment},
            self.seconds + other.seconds,
            {**self.items, **other.items},
            {**self.observed, **other.observed},
        )


def first_items(measurement: Measurement, metric: str, count: int) -> Sequence[float]:
    """The items of a metric as if no more than the first so many had been measured.

    Those of perplexity are linear in losses about the mean of all, exp(m) (1 + l - m), and are moved to the mean of the
    first. Those of other metrics that are no means (F1) stay as they are, which is right to first order.
    """
    items = measurement.items.get(metric, ())
    if metric != "perplexity" or count >= len(items):
        return items[:count]
    whole = measurement.metrics[metric]
    losses = [item / whole - 1 for item in items[:count]]
    mean = statistics.fmean(losses)
    return [whole * math.exp(mean) * (1 + loss - mean) for loss in losses]


def standard_error(items: Sequence[float]) -> float:
    """Of the items' mean; 0 for a single one, which says nothing about spread."""
    if len(items) < 2:
        return 0.0
    mean = statistics.fmean(items)
    return math.sqrt(math.fsum((item - mean) ** 2 for item in items) / (len(items) - 1) / len(items))


@dataclass(frozen=True)
class Job:
    """Make `recipe`'s artifact from its parent's (unless it is there already), then take these meters.

    fidelity: the share of the evaluation data that is measured on, 1.0 for all.
    after: the share that it was measured on before, by the same meters: what was seen of that need not be read again
        if that job's result is still there. It decides nothing of the result.
    """

    recipe: Recipe
    meters: tuple[str, ...]
    materials_digest: str
    fidelity: float = 1.0
    after: float = 0.0

    @property
    def id(self) -> str:
        """The digest of all that decides the result: the key of its record in the store."""
        parts = [self.recipe.id, list(self.meters), self.materials_digest, self.fidelity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def before(self) -> Job | None:
        """The job that measured the share `after`."""
        return dataclasses.replace(self, fidelity=self.after, after=0.0) if self.after else None


@dataclass(frozen=True)
class Success:
    """artifact: its content digest in the store; size_bytes: of the whole folder; seconds: making it took.

    spared_seconds: making it would have taken so much longer without statistics that were there.
    found: nothing ran now: the result was there.
    """

    artifact: str
    size_bytes: int
    measurement: Measurement
    seconds: float
    spared_seconds: float = 0.0
    found: bool = False


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    message: str
    traceback: str = ""


Outcome = Success | Failure


def materials_from_dict(record: Mapping[str, Any]) -> Materials:
    """The materials that `dataclasses.asdict` made plain."""
    texts = {}
    for name in ("evaluation", "calibration", "training"):
        text = record[name]
        texts[name] = None if text is None else TextSource(**{**text, "part": tuple(text["part"])})
    # What was recorded by an earlier version tells of no tasks.
    asked = record.get("tasks")
    tasks = None if asked is None else TaskSource(**{**asked, "names": tuple(asked["names"])})
    return Materials(**{**record, **texts, "tasks": tasks, "target": Target(**record["target"])})


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain data, which shares what it holds: to be written, not changed."""
    found = {"outcome": type(outcome).__name__.lower(), **vars(outcome)}
    if isinstance(outcome, Success):
        found["measurement"] = dict(vars(outcome.measurement))
    return found


def outcome_from_dict(record: Mapping[str, Any]) -> Outcome:
    fields = {name: value for name, value in record.items() if name != "outcome"}
    if record["outcome"] == "failure":
        return Failure(**fields)
    measurement = {**fields.pop("measurement")}
    measurement["unreliable"] = tuple(measurement["unreliable"])
    return Success(measurement=Measurement(**measurement), **fields)
