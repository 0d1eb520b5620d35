"""The contract of all meters, run over every file of jobs/meters."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import meters
from jobs.materials import Materials, Target, TaskSource, TextSource
from jobs.measurement import timing
from jobs.measurement.measurement import standard_error
from jobs.measurement.meter import ShippedModel
from jobs.models.families import TASKS, Task

TARGET = Target(prompt_tokens=8, new_tokens=4, price_per_hour=0.5)
CASES = [(name, task) for name in meters.names() for task in meters.load(name).tasks]


@pytest.fixture(scope="module")
def subject_of(
    tiny: Callable[..., Path],
    text_file: Path,
    lm_eval_task: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Task], ShippedModel]:
    """Return one subject per task, so that meters share the loaded model and its inputs."""
    folder = tmp_path_factory.mktemp("items")
    item = {"context": "An expression", "choices": [" list", " of names"], "answer": 0}
    lm_eval_task(folder, "questions", [item] * 3)
    texts = [json.dumps({"text": f"An expression {n}", "label": n % 2}) for n in range(3)]
    (folder / "labels.jsonl").write_text("\n".join(texts))

    @functools.cache
    def subject(task: Task) -> ShippedModel:
        model = tiny(*{"causal-lm": ("llama",), "embedding": ("bert",)}.get(task, ("bert", "classification")))
        source = TextSource(str(text_file), 3, 16)
        questions, labels = str(folder / "questions.jsonl"), str(folder / "labels.jsonl")
        materials = Materials(
            str(model),
            task,
            source,
            choices=questions,
            labelled=labels,
            tasks=TaskSource(("questions",), str(folder)),
            target=TARGET,
        )
        return ShippedModel(model, model, materials)

    return subject


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_meter_measures_exactly_its_declared_metrics(
    name: str, task: Task, subject_of: Callable[[Task], ShippedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_S", 0.0)  # one try, also on a noisy machine
    meter, subject = meters.load(name), subject_of(task)
    if meter.missing(TARGET) is not None:
        with pytest.raises(ValueError, match=f"{meter.metrics[0]} cannot be measured"):
            meter.measure(subject)
        return
    measurement = meter.measure(subject)
    assert {*meter.metrics} <= {*measurement.metrics} <= {*meter.metrics, *meter.diagnostics}
    assert {*measurement.errors} <= {*measurement.metrics}
    assert {*measurement.unreliable} <= {*measurement.metrics}
    assert all(error >= 0 for error in measurement.errors.values())
    for metric, items in measurement.items.items():
        assert sum(items) / len(items) == pytest.approx(measurement.metrics[metric])
        assert standard_error(items) == pytest.approx(measurement.errors[metric])
    assert measurement.items or meter.reads is None, (
        "a meter that reads data must return a value per item, for paired comparisons"
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_of_a_task_has_exactly_one_meter(task: Task) -> None:
    task_meters = [meters.load(name) for name, meter_task in CASES if meter_task == task]
    produced = [metric for meter in task_meters for metric in meter.metrics]
    all_metrics = produced + [metric for meter in task_meters for metric in meter.diagnostics]
    assert len(all_metrics) == len(set(all_metrics))
    for metric in produced:
        assert metric in meters.load(meters.meter_of(metric, task)).metrics


def test_an_unknown_metric_is_refused_with_the_available_ones() -> None:
    with pytest.raises(LookupError, match="decode_ms"):
        meters.meter_of("warmth", "causal-lm")
