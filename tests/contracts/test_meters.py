"""What every meter promises, checked on whatever meters there are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import meters
from jobs.families import TASKS, Task
from jobs.job import Materials, Target, TextSource
from jobs.meter import Subject
from jobs.meters import latency

CASES = [(name, task) for name in meters.names() for task in meters.load(name).tasks]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    item = {"context": "An expression", "choices": [" list", " of names"], "answer": 0}
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join([json.dumps(item)] * 3))
    return str(file)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"An expression {n}", "label": n % 2}) for n in range(3)))
    return str(file)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_meter_measures_exactly_the_metrics_it_names(
    name: str, task: Task, tiny: Callable[..., Path], text_file: Path, questions: str, labels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(latency, "_PATIENCE_S", 0.0)  # one try, however noisy the machine that tests run on
    folder = tiny(*{"causal-lm": ("llama",), "embedding": ("bert",)}.get(task, ("bert", "classification")))
    target = Target(prompt_tokens=8, new_tokens=4)
    source = TextSource(str(text_file), 3, 16)
    materials = Materials(str(folder), task, source, choices=questions, labelled=labels, target=target)
    meter = meters.load(name)
    found = meter.measure(Subject(folder, folder, materials))
    assert set(found.metrics) == set(meter.metrics)
    assert set(found.errors) <= set(meter.metrics)
    assert set(found.unreliable) <= set(meter.metrics)
    assert all(error >= 0 for error in found.errors.values())


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_of_a_task_has_one_meter(task: Task) -> None:
    produced = [m for name, of in CASES if of == task for m in meters.load(name).metrics]
    assert len(produced) == len(set(produced))
    for metric in produced:
        assert metric in meters.load(meters.producing(metric, task)).metrics


def test_a_metric_that_nothing_measures_is_refused_with_what_there_is() -> None:
    with pytest.raises(LookupError, match="decode_ms"):
        meters.producing("warmth", "causal-lm")
