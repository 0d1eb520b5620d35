"""Convert the data and the target of a study file to the materials of its jobs, and compute their digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from jobs import data
from jobs.materials import Materials, Target, TaskSource, TextSource
from jobs.meters import lm_eval_tasks
from jobs.models.families import Task
from orchestrator.config.schema import Evaluation, StudyConfig, Text


def materials_of(config: StudyConfig, task: Task) -> Materials:
    """The materials of a study. The target and the tasks have the fields of their sections of the study file."""
    tasks = config.data.tasks
    task_source = None
    if tasks is not None:
        task_source = TaskSource(**{**vars(tasks), "names": tuple(tasks.names)})
    return Materials(
        model=config.model,
        task=task,
        evaluation=_text_source(config.data.evaluation),
        calibration=_text_source(config.data.calibration),
        training=_text_source(config.data.train),
        choices=config.data.choices,
        labelled=config.data.labelled,
        tasks=task_source,
        target=Target(**vars(config.target)),
    )


def data_digest(materials: Materials) -> str:
    """The digest of the texts that steps read. It is a part of every recipe id."""
    sources = (materials.calibration, materials.training)
    return _digest([None if source is None else data.digest(source) for source in sources])


def measuring_digest(materials: Materials) -> str:
    """The digest of the data that meters read, and of the target. It is a part of every job id."""
    parts: list[object] = [None if materials.evaluation is None else data.digest(materials.evaluation)]
    for file in (materials.choices, materials.labelled):
        parts.append(None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest())
    target = materials.target
    parts += [materials.task, target.runtime, target.threads, target.prompt_tokens, target.new_tokens]
    if target.price_per_hour is not None:
        parts.append(target.price_per_hour)
    if materials.tasks is not None:
        parts.append(lm_eval_tasks.digest(materials.tasks))
    return _digest(parts)


def _text_source(text: Text | Evaluation | None) -> TextSource | None:
    if text is None:
        return None
    if isinstance(text, Text):
        samples, tokens = text.samples, text.tokens
    else:
        samples, tokens = text.tokens // max(text.window, 1), text.window
    part = (text.part[0], text.part[-1]) if text.part else (0.0, 0.0)
    return TextSource(text.path, samples, tokens, part, dict(text.where))


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
