"""What every meter promises, checked on whatever meters there are."""

import json
from pathlib import Path

import pytest

from jobs import meters
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


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_meter_measures_exactly_the_metrics_it_names(
    name: str, task: str, tiny_llama: Path, tiny_bert: Path, text_file: Path, questions: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(latency, "_PATIENCE_S", 0.0)  # one try, however noisy the machine that tests run on
    folder = tiny_llama if task == "causal-lm" else tiny_bert
    target = Target(prompt_tokens=8, new_tokens=4)
    source = TextSource(str(text_file), 3, 16)
    materials = Materials(str(folder), task, source, choices=questions, target=target)  # type: ignore[arg-type]
    meter = meters.load(name)
    found = meter.measure(Subject(folder, folder, materials))
    assert set(found.metrics) == set(meter.metrics)
    assert set(found.errors) <= set(meter.metrics)
    assert set(found.unreliable) <= set(meter.metrics)
    assert all(error >= 0 for error in found.errors.values())


@pytest.mark.parametrize("task", ["causal-lm", "embedding"])
def test_every_metric_of_a_task_has_one_meter(task: str) -> None:
    produced = [m for name, of in CASES if of == task for m in meters.load(name).metrics]
    assert len(produced) == len(set(produced))
    for metric in produced:
        assert metric in meters.load(meters.producing(metric, task)).metrics  # type: ignore[arg-type]


def test_a_metric_that_nothing_measures_is_refused_with_what_there_is() -> None:
    with pytest.raises(LookupError, match="decode_ms"):
        meters.producing("warmth", "causal-lm")
