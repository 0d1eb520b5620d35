"""Tasks of lm-eval, run on the shipped model (`pip install 'slimfront[tasks]'`)."""

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
from jobs.measurement.generation import generate
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Meter, ShippedModel, run_meter
from jobs.models import loading
from jobs.models.tokenizers import Tokenizer
from jobs.runtimes import Runner

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_NEW_TOKENS = 256
"""Maximum length of an answer if a task sets none; lm-eval's own default."""


def missing(target: Target) -> str | None:
    """Return the command that installs lm-eval if it is missing, else None."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-eval is not installed: pip install 'slimfront[tasks]'"
    return None


def measure(subject: ShippedModel) -> Measurement:
    """Measure task_score: the mean over the study's tasks of each task's metric.

    A group counts as the mean of its tasks. The standard error is over items, for fixed tasks. A measurement on more
    items starts again, since the examples before each item are drawn in sequence.
    """
    if (reason := missing(subject.materials.target)) is not None:
        raise ValueError(f"task_score cannot be measured: {reason}")
    source = subject.materials.tasks
    if source is None:
        raise ValueError("task_score needs tasks; give the study data.tasks")
    from lm_eval import simple_evaluate

    names, metrics = zip(*(_split(name) for name in source.names), strict=True)
    longest = int(getattr(loading.load_config(subject.original), "max_position_embeddings", 2048))
    results: Any = simple_evaluate(
        _adapter(subject.runner, subject.tokenizer, longest),
        tasks=list(dict.fromkeys(names)),
        task_manager=_manager(source.folder),
        num_fewshot=source.shots,
        limit=_limit(source, subject.fidelity),
        bootstrap_iters=0,
        # This meter does not change the random generators of the process.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    items = [_task_items(results, name, metric) for name, metric in zip(names, metrics, strict=True)]
    return run_meter({"task_score": torch.tensor(weighted(items), dtype=torch.float64)})


def _task_items(results: Mapping[str, Any], name: str, metric: str | None) -> dict[str, list[float]]:
    """Return the items of each task that a name stands for."""
    return {task: _items(results, task, metric) for task in _leaves(results, name)}


def weighted(names: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
    """Return the score plus the first-order effect of each item (see `run_meter`).

    The score is the mean over names of the mean over their tasks of the mean over their items.
    """
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
    """Refuse unknown tasks without downloading data. Raises ValueError, or FileNotFoundError for the folder."""
    if not source.names:
        raise ValueError("names is empty: expected names of lm-eval's tasks, as name or name:metric")
    if source.items is not None and source.items < 1:
        raise ValueError(f"items={source.items}, expected at least 1")
    manager = _manager(source.folder)
    for name, _ in map(_split, source.names):
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm-eval has no task {name!r}, and {source.folder or 'no folder given'} neither"
            )


def digest(source: TaskSource) -> str:
    """Return the digest of everything that affects a score: the tasks, lm-eval's version, the folder's files."""
    total = hashlib.sha256(json.dumps([*dataclasses.astuple(source), version("lm-eval")]).encode())
    if source.folder is not None:
        for file in sorted(Path(source.folder).rglob("*")):
            if file.is_file():
                total.update(str(file.relative_to(source.folder)).encode() + file.read_bytes())
    return total.hexdigest()


def _split(name: str) -> tuple[str, str | None]:
    """Split `arc_easy:acc_norm` into task and metric; None stands for the first metric of the task."""
    task, _, metric = name.partition(":")
    return task, metric or None


@lru_cache(maxsize=4)
def _manager(folder: str | None) -> Any:
    """Return lm-eval's index of tasks. It is cached, since reading thousands of task files takes seconds."""
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not there: expected a folder of lm-eval's task files")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _limit(source: TaskSource, fidelity: float) -> float | None:
    """Return the number of items of each task, or a share below 1, as lm-eval expects; None for all items."""
    if source.items is None:
        if fidelity < 1:
            return fidelity
        return None
    return max(1, round(fidelity * source.items))


def _leaves(results: Mapping[str, Any], name: str) -> list[str]:
    """Return the tasks that a name stands for: itself, or all tasks of a group and its groups."""
    members = results.get("group_subtasks", {}).get(name)
    if not members:
        return [name]
    return [leaf for member in members for leaf in _leaves(results, member)]


def _items(results: Mapping[str, Any], task: str, metric: str | None) -> list[float]:
    """Return the items of a task's metric, which must be their mean."""
    # Keys are metric,filter. Several filters may extract the answer from the generated text; the first one counts.
    keys = [key.split(",") for key in results["results"][task] if "," in key]
    filters = {name: filter for name, filter in reversed(keys) if not name.endswith("_stderr")}
    chosen = metric or keys[0][0]
    if chosen not in filters:
        raise ValueError(f"task {task} has no metric {chosen} (it has: {', '.join(reversed(filters))})")
    samples = [sample for sample in results["samples"][task] if sample["filter"] == filters[chosen]]
    values = [sample.get(chosen) for sample in samples]
    single = all(isinstance(value, int | float) for value in values)
    mean = results["results"][task][f"{chosen},{filters[chosen]}"]
    if not single or abs(sum(values) / len(values) - mean) > 1e-6:
        raise ValueError(
            f"{chosen} of task {task} is not a mean over its items; choose another metric of this task"
        )
    return [float(value) for value in values]


def _adapter(runner: Runner, tokenizer: Tokenizer, longest: int) -> TemplateLM:
    """Return the runner behind lm-eval's interface. Its class needs lm-eval, so it is defined here."""
    from lm_eval.api.model import TemplateLM

    class Shipped(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            if tokenizer.bos_token_id is None:
                return int(tokenizer.eos_token_id)
            return int(tokenizer.bos_token_id)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: object
        ) -> list[int]:
            return list(
                tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False).input_ids
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **options: object
        ) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = []
            # The choices of one question are adjacent: they go through the model together.
            for _, group in itertools.groupby(requests, key=lambda request: request[1]):
                pairs = [(context, ending) for _, context, ending in group]
                room = longest - max(len(ending) for _, ending in pairs)
                context = pairs[0][0][-room:]
                scores, greedy = likelihood.log_likelihoods(runner, context, [ending for _, ending in pairs])
                answers += zip(scores.tolist(), greedy.tolist(), strict=True)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise ValueError("perplexity is not available as a task: it is measured on data.evaluation")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_generate(runner, tokenizer, longest, *request.args) for request in requests]

    return Shipped()


def _generate(
    runner: Runner, tokenizer: Tokenizer, longest: int, context: str, options: Mapping[str, Any]
) -> str:
    """Return the greedy continuation of the context up to the first stop text."""
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise ValueError(
            "a task that samples its answers gives another result each time; it is not supported"
        )
    stops = options.get("until") or []
    if isinstance(stops, str):
        stops = [stops]
    max_tokens = min(int(options.get("max_gen_toks", _NEW_TOKENS)), longest // 2)
    encoded = tokenizer(context, add_special_tokens=False, verbose=False).input_ids
    prompt = list(encoded)[-(longest - max_tokens) :]
    tokens: list[int] = []
    text = ""
    for token in generate(runner, np.array([prompt]), max_tokens, tokenizer.eos_token_id):
        tokens.append(token)
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if any(stop in text for stop in stops):
            break
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


METER = Meter(metrics=("task_score",), tasks=("causal-lm",), measure=measure, reads="tasks", missing=missing)
