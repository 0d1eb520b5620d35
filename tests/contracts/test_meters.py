"""What every meter promises, checked on whatever meters there are."""

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
    """One subject for each task, so that what several meters read of it is made once."""
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
def test_a_meter_measures_exactly_the_metrics_it_names(
    name: str, task: Task, subject_of: Callable[[Task], ShippedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_S", 0.0)  # one try, however noisy the machine that tests run on
    meter, subject = meters.load(name), subject_of(task)
    if meter.missing(TARGET) is not None:
        with pytest.raises(ValueError, match=f"{meter.metrics[0]} cannot be measured"):
            meter.measure(subject)
        return
    found = meter.measure(subject)
    assert {*meter.metrics} <= {*found.metrics} <= {*meter.metrics, *meter.diagnostics}
    assert {*found.errors} <= {*found.metrics}
    assert {*found.unreliable} <= {*found.metrics}
    assert all(error >= 0 for error in found.errors.values())
    for metric, items in found.items.items():
        assert sum(items) / len(items) == pytest.approx(found.metrics[metric])
        assert standard_error(items) == pytest.approx(found.errors[metric])
    assert found.items or meter.reads is None, (
        "what reads items of data tells of each, for paired comparisons"
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_of_a_task_has_one_meter(task: Task) -> None:
    found = [meters.load(name) for name, of in CASES if of == task]
    produced = [metric for meter in found for metric in meter.metrics]
    every = produced + [metric for meter in found for metric in meter.diagnostics]
    assert len(every) == len(set(every))
    for metric in produced:
        assert metric in meters.load(meters.meter_of(metric, task)).metrics


def test_a_metric_that_nothing_measures_is_refused_with_what_there_is() -> None:
    with pytest.raises(LookupError, match="decode_ms"):
        meters.meter_of("warmth", "causal-lm")
