"""The data that a study gives to all its jobs: original, texts, tasks, target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.models.families import Task


@dataclass(frozen=True)
class Target:
    """The device and the workload that latency is measured for."""

    runtime: str = "torch"
    threads: int = 1
    prompt_tokens: int = 128
    """Length of the prompts."""
    new_tokens: int = 32
    """Tokens that are generated after each prompt."""
    price_per_hour: float | None = None
    """Price of such a machine, in any currency."""


@dataclass(frozen=True)
class TextSource:
    """Text to read: a .txt or .jsonl file (field `text`), a folder of such files, or `package:MODULE`."""

    path: str
    samples: int
    """Number of windows."""
    tokens: int
    """Length of each window in tokens."""
    part: tuple[float, float] = (0.0, 1.0)
    """The documents between these two shares of the source, in order, so that one source can serve several uses."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Only jsonl documents whose fields have these values are read."""


@dataclass(frozen=True)
class TaskSource:
    """Tasks of lm-eval."""

    names: tuple[str, ...]
    """Each `name` or `name:metric`."""
    folder: str | None = None
    """Folder of task files in addition to lm-eval's own."""
    items: int | None = None
    """Number of items of each task; None for all."""
    shots: int | None = None
    """Number of solved examples before each item; None for the task's own number."""


@dataclass(frozen=True)
class Materials:
    """The data that all jobs of a study share."""

    model: str
    task: Task
    evaluation: TextSource | None = None
    calibration: TextSource | None = None
    training: TextSource | None = None
    choices: str | None = None
    """A jsonl file of multiple-choice items (context, choices, answer)."""
    labelled: str | None = None
    """A jsonl file of texts to classify (text, label)."""
    tasks: TaskSource | None = None
    target: Target = Target()

    @property
    def new_tokens(self) -> int:
        """The number of tokens generated after each prompt: 0 unless the task is causal-lm."""
        if self.task != "causal-lm":
            return 0
        return self.target.new_tokens


def materials_from_dict(record: Mapping[str, Any]) -> Materials:
    """Return the materials that `dataclasses.asdict` turned into plain data."""
    fields: dict[str, Any] = {**record, "target": Target(**record["target"])}
    for name in ("evaluation", "calibration", "training"):
        text = record[name]
        if text is not None:
            fields[name] = TextSource(**{**text, "part": tuple(text["part"])})
    tasks = record.get("tasks")  # the first versions recorded no tasks
    if tasks is not None:
        fields["tasks"] = TaskSource(**{**tasks, "names": tuple(tasks["names"])})
    return Materials(**fields)
