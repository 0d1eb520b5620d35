"""The keys of a study file, with their defaults. One class is one section of the file.

A key whose type allows text next to numbers takes a number or `auto`: slimfront chooses the value then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING

Number = TypeVar("Number", int, float)

AUTO = "auto"


def unless_auto(value: Number | str) -> Number | None:
    """The number that a checked key holds; None if it holds `auto`."""
    return None if isinstance(value, str) else value


@dataclass
class Text:
    """A text that steps read: calibration or training."""

    path: str = MISSING
    """A .txt file, a .jsonl file (field `text`), a folder of them, or `package:MODULE`."""
    samples: int = 128
    """The number of windows, from 1."""
    tokens: int = 512
    """The length of each window in tokens."""
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """The share of the documents at which the text begins and ends, each from 0 to 1."""
    where: dict[str, str] = field(default_factory=dict)
    """Reads only the .jsonl documents whose fields have these values."""


@dataclass
class Evaluation:
    """The text on which quality is measured."""

    path: str = MISSING
    """A .txt file, a .jsonl file (field `text`), a folder of them, or `package:MODULE`."""
    tokens: int = 16384
    """The length of the whole text in tokens, from 1."""
    window: int = 512
    """The length of each window in tokens, from 2 to `tokens`."""
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """The share of the documents at which the text begins and ends, each from 0 to 1."""
    where: dict[str, str] = field(default_factory=dict)
    """Reads only the .jsonl documents whose fields have these values."""


@dataclass
class Tasks:
    """Tasks of lm-eval on which quality is measured."""

    names: list[str] = field(default_factory=list)
    """Each `NAME` or `NAME:METRIC`."""
    folder: str | None = None
    """A folder of further task files; none if null."""
    items: int | None = None
    """The number of items of each task, from 1; all items if null."""
    shots: int | None = None
    """The number of solved examples before each item, from 0; the task's own number if null."""


@dataclass
class Data:
    """The texts and items that a study reads. A study needs only those that its techniques and objectives read."""

    evaluation: Evaluation | None = None
    """The text on which quality is measured."""
    calibration: Text | None = None
    """The text on which statistics and gradients are computed."""
    train: Text | None = None
    """The text on which techniques train."""
    choices: str | None = None
    """A .jsonl file of multiple-choice items."""
    labelled: str | None = None
    """A .jsonl file of texts with labels, for classification."""
    tasks: Tasks | None = None
    """Tasks of lm-eval, for the metric `task_score`."""


@dataclass
class ObjectiveSpec:
    """One objective: its key is the metric."""

    goal: str = MISSING
    """`min` or `max`."""
    limit: float | None = None
    """The worst value that a candidate of the front may have, in the metric's unit; no limit if null."""


@dataclass
class TargetSpec:
    """The machine and the load for which models are compressed."""

    runtime: str = "torch"
    """The library that runs the model: `slimfront doctor` lists those of this machine."""
    threads: int = 1
    """The number of CPU threads, from 1 to the cores of the machine."""
    prompt_tokens: int = 128
    """The length of each prompt in tokens, from 1."""
    new_tokens: int = 32
    """The number of generated tokens after each prompt, from 1."""
    price_per_hour: float | None = None
    """The price of such a machine in any currency, above 0, for the metric `cost_per_million_tokens`."""


@dataclass
class SearchSpec:
    """The search for the front."""

    algorithm: str = "surrogate"
    """`surrogate`, `gp`, `tpe`, `nsga2`, `random` or `grid`."""
    order: str = "given"
    """`given` keeps the order of the stages, `any` searches it as well."""
    candidates: int = 24
    """The number of candidates to try, from 1."""
    seed: int = 0
    """The seed of every random choice, from 0."""
    table: int | str = AUTO
    """The number of models, at most, that are timed before the search to predict the latency of all others. 0: none,
    multiply-adds stand in for time. `auto`: 32 for studies of at least 64 candidates, else 0."""
    rungs: Any = AUTO
    """The shares of the evaluation on which candidates are measured in turn as long as they may be on the front: rising
    numbers between 0 and 1. An empty list: the whole evaluation at once. `auto`: by the length of the text."""


@dataclass
class TrackingSpec:
    """Tracking with MLflow."""

    uri: str | None = None
    """The address of the MLflow server; `none` for no tracking. If null, an SQLite file in the store's local folder."""


@dataclass
class ClusterSpec:
    """The machines on which jobs run. Nothing here changes the results of a study."""

    slots: int | str = AUTO
    """The number of jobs that run at once, from 1. `auto`: one for each core; on a cluster, as many as it has."""
    memory_gib: float | None = None
    """The memory in GiB that all jobs of this machine may use together, above 0; no limit if null."""
    address: str | None = None
    """The address of a running Ray cluster. If null, Ray runs on this machine for the time of the study."""
    stall_seconds: float | None = 3600.0
    """A job that reports no progress for this time is ended and tried again; never if null."""
    price_per_hour: float | None = None
    """The price of each node in any currency, above 0; the price that the cloud or a table states if null."""
    gpus: int | float | str = 0
    """On a cluster, the number of GPUs that each job holds, from 0. `auto`: the part of one GPU that the job's memory
    takes of `device_gib`."""
    timing: dict[str, str] = field(default_factory=dict)
    """On a cluster, the labels of the nodes that measure latency. If empty, nodes like the first that measured it."""
    start_seconds: float = 900.0
    """On a cluster, the time to wait for a first node, and for another one when all are gone."""
    ranks: int | str = AUTO
    """The number of slots that each training takes, from 1. `auto`: as few as can hold it."""
    zero_stage: int | str = AUTO
    """The ZeRO stage of trainings with several ranks, 0 to 3. `auto`: the lowest that fits the memory."""
    micro_batch: int | str = AUTO
    """The number of rows of one forward pass, from 1. `auto`: as many as fit the memory."""
    device_gib: int | float | str = AUTO
    """The memory in GiB of a slot's GPU, or without GPU its share of the node's memory, above 0. `auto`: as the node
    reports; then a training takes several ranks only if this machine has a GPU."""


@dataclass
class BudgetSpec:
    """Limits of a study. Once a limit is reached, no new work starts."""

    money: float | None = None
    """In the currency of the nodes' prices, above 0; no limit if null."""
    hours: float | None = None
    """Hours by the clock during which the study runs, above 0; no limit if null."""


@dataclass
class StudyConfig:
    """A study file."""

    name: str = MISSING
    """Letters, digits, '.', '_' and '-'. The name of the study's folder in the store."""
    model: str = MISSING
    """The original model: a folder, a hub id, or `package:NAME`."""
    task: str = "causal-lm"
    """`causal-lm`, `classification` or `embedding`."""
    data: Data = field(default_factory=Data)
    objectives: dict[str, ObjectiveSpec] = field(default_factory=dict)
    """At least one metric with its goal."""
    target: TargetSpec = field(default_factory=TargetSpec)
    space: dict[str, Any] = field(default_factory=dict)
    """Stages in the order in which they apply; each is a mapping of techniques to their options."""
    search: SearchSpec = field(default_factory=SearchSpec)
    store: str = "runs"
    """A folder, or s3://BUCKET/PREFIX with the options that cluster/storage/s3.py describes."""
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)
