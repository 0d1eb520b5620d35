"""What a study gives every job: the target, the texts, the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.models.families import Task


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
