"""Tasks of lm-eval, the field's collection of benchmarks, run on what is shipped (`pip install 'slimfront[tasks]'`)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.materials import Target, TaskSource
from jobs.measurement import likelihood
from jobs.measurement.generation import continued
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, Subject, run_meter
from jobs.models import loading
from jobs.models.tokenizers import Tokenizer
from jobs.runtimes import Runner

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_NEW_TOKENS = 256
"""Written at most where a task does not say how many; lm-eval's own default."""


def missing(target: Target) -> str | None:
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-eval is not installed: pip install 'slimfront[tasks]'"
    return None


def measure(subject: Subject) -> Measurement:
    """task_score: the mean over the tasks that the study names of each one's metric, a group's being the mean over
    its tasks. The standard error is over items, the tasks being given. More items are read from the start again: the
    examples before each are drawn in turn."""
    if (reason := missing(subject.materials.target)) is not None:
        raise ValueError(f"task_score cannot be measured: {reason}")
    source = subject.materials.tasks
    if source is None:
        raise ValueError("task_score needs tasks; give the study data.tasks")
    from lm_eval import simple_evaluate

    names, asked = zip(*(_split(name) for name in source.names), strict=True)
    longest = int(getattr(loading.load_config(subject.original), "max_position_embeddings", 2048))
    found: Any = simple_evaluate(
        _adapter(subject.runner, subject.tokenizer, longest),
        tasks=list(dict.fromkeys(names)),
        task_manager=_manager(source.folder),
        num_fewshot=source.shots,
        limit=_limit(source, subject.fidelity),
        bootstrap_iters=0,
        # The process's generators are not this meter's to set.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    items = [
        {leaf: _items(found, leaf, metric) for leaf in _leaves(found, name)}
        for name, metric in zip(names, asked, strict=True)
    ]
    return run_meter({"task_score": torch.tensor(weighted(items), dtype=torch.float64)})


def weighted(names: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
    """The mean over the names of the mean over their tasks of the mean over their items, and by how much each item
    moves it (see `measured`)."""
    shares = [(1 / len(names) / len(tasks), values) for tasks in names for values in tasks.values()]
    count = sum(len(values) for _, values in shares)
    means = [sum(values) / len(values) for _, values in shares]
    score = sum(share * mean for (share, _), mean in zip(shares, means, strict=True))
    return [
        score + count * share / len(values) * (value - mean)
        for (share, values), mean in zip(shares, means, strict=True)
        for value in values
    ]


def check(source: TaskSource) -> None:
    """Refuse what is no task, without fetching any data; ValueError, or FileNotFoundError for the folder."""
    if not source.names:
        raise ValueError("names is empty: expected names of lm-eval's tasks, as name or name:metric")
    if source.items is not None and source.items < 1:
        raise ValueError(f"items={source.items}, expected at least 1")
    known = _manager(source.folder)
    for name, _ in map(_split, source.names):
        if name not in known.all_tasks:
            raise ValueError(
                f"lm-eval has no task {name!r}, and {source.folder or 'no folder given'} neither"
            )


def digest(source: TaskSource) -> str:
    """The digest of all that decides the score of a model: the tasks, lm-eval's version, the folder's files."""
    total = hashlib.sha256(json.dumps([*dataclasses.astuple(source), version("lm-eval")]).encode())
    if source.folder is not None:
        for file in sorted(Path(source.folder).rglob("*")):
            if file.is_file():
                total.update(str(file.relative_to(source.folder)).encode() + file.read_bytes())
    return total.hexdigest()


def _split(name: str) -> tuple[str, str | None]:
    """`arc_easy:acc_norm` as the task and its metric, which without one is the task's first."""
    task, _, metric = name.partition(":")
    return task, metric or None


@lru_cache(maxsize=4)
def _manager(folder: str | None) -> Any:
    """What knows all tasks; kept, since reading lm-eval's thousands of task files takes seconds."""
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not there: expected a folder of lm-eval's task files")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _limit(source: TaskSource, fidelity: float) -> float | None:
    """How many items of each task are read: lm-eval takes a number below 1 as a share."""
    if source.items is None:
        return fidelity if fidelity < 1 else None
    return max(1, round(fidelity * source.items))


def _leaves(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a name stands for: itself, or those of the group and of its groups."""
    inner = found.get("group_subtasks", {}).get(name)
    return [leaf for one in inner for leaf in _leaves(found, one)] if inner else [name]


def _items(found: Mapping[str, Any], task: str, metric: str | None) -> list[float]:
    """What each item adds to the task's metric, which must be a mean over them."""
    # Keys are metric,filter: an answer may be read out of what was written in several ways, of which the first counts.
    told = [key.split(",") for key in found["results"][task] if "," in key]
    known = {name: filter for name, filter in reversed(told) if not name.endswith("_stderr")}
    chosen = metric or told[0][0]
    if chosen not in known:
        raise ValueError(f"task {task} has no metric {chosen} (there are: {', '.join(reversed(known))})")
    samples = [one for one in found["samples"][task] if one["filter"] == known[chosen]]
    values = [sample.get(chosen) for sample in samples]
    single = all(isinstance(value, int | float) for value in values)
    mean = found["results"][task][f"{chosen},{known[chosen]}"]
    if not single or abs(sum(values) / len(values) - mean) > 1e-6:
        raise ValueError(f"{chosen} of task {task} is no mean over its items; choose another metric of it")
    return [float(value) for value in values]


def _adapter(runner: Runner, words: Tokenizer, longest: int) -> TemplateLM:
    """The runner as lm-eval asks a model. Its class needs lm-eval, so it is made where that is installed."""
    from lm_eval.api.model import TemplateLM

    class Shipped(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
        @property
        def eot_token_id(self) -> int:
            return int(words.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(words.eos_token_id if words.bos_token_id is None else words.bos_token_id)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **others: object
        ) -> list[int]:
            return list(words(string, add_special_tokens=bool(add_special_tokens), verbose=False).input_ids)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **others: object
        ) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = []
            # The choices of one question come one after the other: all at once.
            for _, same in itertools.groupby(requests, key=lambda request: request[1]):
                pairs = [(context, ending) for _, context, ending in same]
                room = longest - max(len(ending) for _, ending in pairs)
                context = pairs[0][0][-room:]
                scores, greedy = likelihood.of_endings(runner, context, [ending for _, ending in pairs])
                answers += zip(scores.tolist(), greedy.tolist(), strict=True)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise ValueError("perplexity is no task: it is measured on data.evaluation")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_written(runner, words, longest, *request.args) for request in requests]

    return Shipped()


def _written(runner: Runner, words: Tokenizer, longest: int, context: str, options: Mapping[str, Any]) -> str:
    """What the model writes after the context, always taking the likeliest token, up to the first stop."""
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise ValueError(
            "a task that samples its answers cannot be measured twice alike; it is not supported"
        )
    stops = options.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    most = min(int(options.get("max_gen_toks", _NEW_TOKENS)), longest // 2)
    prompt = list(words(context, add_special_tokens=False, verbose=False).input_ids)[-(longest - most) :]
    tokens: list[int] = []
    text = ""
    for token in continued(runner, np.array([prompt]), most, words.eos_token_id):
        tokens.append(token)
        text = str(words.decode(tokens, skip_special_tokens=True))
        if any(stop in text for stop in stops):
            break
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


METER = Meter(metrics=("task_score",), tasks=("causal-lm",), measure=measure, reads="tasks", missing=missing)
