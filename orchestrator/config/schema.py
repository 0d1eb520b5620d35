"""Config: the study file. The one door to OmegaConf; reports every wrong key at once, each with its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Text:
    """Windows of text: `samples` of `tokens` each, from a .txt, .jsonl, a folder of them, or `package:MODULE`."""

    path: str = MISSING
    samples: int = 128
    tokens: int = 512
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The text that quality is measured on: `tokens` in all, in windows of `window`."""

    path: str = MISSING
    tokens: int = 16384
    window: int = 512
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class Tasks:
    """Tasks of lm-eval, each `name` or `name:metric`. folder: of task files of your own; items: how many of each are
    read, all without it; shots: solved examples before each, the task's own number without it."""

    names: list[str] = field(default_factory=list)
    folder: str | None = None
    items: int | None = None
    shots: int | None = None


@dataclass
class Data:
    """choices: a .jsonl of multiple-choice items; labelled: a .jsonl of texts with labels, to classify; tasks:
    lm-eval's, for task_score."""

    evaluation: Evaluation | None = None
    calibration: Text | None = None
    train: Text | None = None
    choices: str | None = None
    labelled: str | None = None
    tasks: Tasks | None = None


@dataclass
class ObjectiveSpec:
    goal: str = MISSING
    limit: float | None = None


@dataclass
class TargetSpec:
    """price_per_hour: of such a machine, in any currency, for cost_per_million_tokens."""

    runtime: str = "torch"
    threads: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    price_per_hour: float | None = None


@dataclass
class SearchSpec:
    """order: `given` keeps the stages as they stand, `any` searches their order too. table: how many models are
    timed before the search, at most, to predict how fast all others are (`auto`: 32 where at least 64 candidates
    are tried; 0: multiply-adds stand in for time). rungs: the shares of the evaluation that candidates are measured on
    first, as long as they may be on the front (`auto`: by the length of the text; none: all of it at once)."""

    algorithm: str = "surrogate"
    order: str = "given"
    candidates: int = 24
    seed: int = 0
    table: Any = "auto"
    rungs: Any = "auto"


@dataclass
class TrackingSpec:
    """uri: MLflow's address; without one, SQLite in the study's folder. `none` switches tracking off."""

    uri: str | None = None


@dataclass
class ClusterSpec:
    """slots: how many jobs run at once (`auto`: one per core; on a cluster, as many as it could have). memory_gib: what
    they may use together on this machine. address: a running Ray's; without one, Ray is started here for as long as the
    study runs. stall_seconds: a job that reports no progress for so long hangs, is ended and tried again; null: never.
    price_per_hour: of each node, instead of what the cloud or a table says, in any currency.

    On a cluster, gpus: what each job holds of a GPU, or how many (`auto`: the part of one that its memory takes of
    device_gib); timing: labels of the nodes on which latency is measured (none: those like the first one that was);
    start_seconds: how long is waited for the first node, or for another when all are gone.

    Of jobs that train, ranks: the slots that each takes (`auto`: as few as hold it), zero_stage: what these share out
    (`auto`: as little as fits), micro_batch: rows at once (`auto`: as many as fit), device_gib: the memory that a
    slot's GPU has, or its share of a node without (`auto`: as the machine says; several ranks only by a GPU of here).
    They decide nothing of what the study finds."""

    slots: Any = "auto"
    memory_gib: float | None = None
    address: str | None = None
    stall_seconds: float | None = 3600.0
    price_per_hour: float | None = None
    gpus: Any = 0
    timing: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 900.0
    ranks: Any = "auto"
    zero_stage: Any = "auto"
    micro_batch: Any = "auto"
    device_gib: Any = "auto"


@dataclass
class BudgetSpec:
    """The most that a study may use, then nothing new is begun. money: in the currency of the nodes' prices; hours: by
    the clock while it runs."""

    money: float | None = None
    hours: float | None = None


@dataclass
class StudyConfig:
    """store: a folder, or s3://BUCKET/PREFIX with the options that cluster/storage/s3.py tells."""

    name: str = MISSING
    model: str = MISSING
    task: str = "causal-lm"
    data: Data = field(default_factory=Data)
    objectives: dict[str, ObjectiveSpec] = field(default_factory=dict)
    target: TargetSpec = field(default_factory=TargetSpec)
    space: dict[str, Any] = field(default_factory=dict)
    search: SearchSpec = field(default_factory=SearchSpec)
    store: str = "runs"
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)
