"""Continuing an earlier measurement gives exactly the same numbers as measuring everything at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import meters
from jobs.job import Success, outcome_from_dict, outcome_to_dict
from jobs.materials import Materials, TextSource
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel
from jobs.models.families import Task

ITEMS = 24
TOKENS = {"text": 100, "agreement": 100}
AT_ONCE = {"text": 5, "agreement": 10}
"""Tokens per window and windows per batch; batches divide neither the rungs nor the total evenly."""
CASES: list[tuple[str, Task]] = [
    ("text", "causal-lm"),
    ("agreement", "embedding"),
    ("choices", "causal-lm"),
    ("labels", "classification"),
]


class CountingRunner:
    """A runner that records the number of rows of each call."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.rows: list[int] = []

    def answer(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return self._inner.answer(rows)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def subject_of(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> Callable[[str, Task], Callable[..., ShippedModel]]:
    questions = [
        {"context": f"The operator {n}", "choices": [" is", f" was defined {n}"], "answer": n % 2}
        for n in range(ITEMS)
    ]
    texts = [{"text": f"An expression {n} of {n % 5}", "label": n % 2} for n in range(ITEMS)]
    for name, records in (("choices", questions), ("labels", texts)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))

    def make_subject(name: str, task: Task) -> Callable[..., ShippedModel]:
        model = tiny(*{"causal-lm": ("llama",), "embedding": ("bert",)}.get(task, ("bert", "classification")))
        source = TextSource(str(text_file), ITEMS, TOKENS.get(name, 16))
        materials = Materials(
            str(model), task, source, choices=str(tmp_path / "choices"), labelled=str(tmp_path / "labels")
        )

        def at_fidelity(fidelity: float, earlier: Measurement | None = None) -> ShippedModel:
            if earlier is not None:
                earlier = store_and_load(earlier)
            return ShippedModel(model, model, materials, fidelity, before=earlier)

        return at_fidelity

    return make_subject


def store_and_load(measurement: Measurement) -> Measurement:
    """Return the measurement after a round trip through a stored record."""
    outcome = Success("artifact", 1, measurement, 1.0)
    restored = outcome_from_dict(json.loads(json.dumps(outcome_to_dict(outcome))))
    assert isinstance(restored, Success)
    return restored.measurement


def measure(subject: ShippedModel, meter: str) -> tuple[Measurement, list[int]]:
    """Return the measurement and the number of rows of each call of the model."""
    runner = CountingRunner(subject.runner)
    subject.__dict__["runner"] = runner  # replaces the cached property
    return meters.load(meter).measure(subject), runner.rows


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("rungs", [(0.25, 1.0), (1 / 12, 0.3, 0.7, 1.0), (0.25, 0.26, 1.0)])
def test_a_continued_measurement_equals_measuring_all_at_once(
    name: str,
    task: Task,
    rungs: Sequence[float],
    subject_of: Callable[[str, Task], Callable[..., ShippedModel]],
) -> None:
    subject = subject_of(name, task)
    measurement = None
    for rung in rungs:
        measurement, _ = measure(subject(rung, measurement), name)
        at_once, _ = measure(subject(rung), name)
        assert measurement == at_once
        assert {len(items) for items in measurement.items.values()} == {subject(rung).items_of(ITEMS)}


@pytest.mark.parametrize(("name", "task"), CASES)
def test_continuing_reads_only_rows_outside_complete_batches(
    name: str, task: Task, subject_of: Callable[[str, Task], Callable[..., ShippedModel]]
) -> None:
    subject = subject_of(name, task)
    first, first_rows = measure(subject(0.5), name)
    _, later_rows = measure(subject(1.0, first), name)
    rows_per_item = {"choices": 2}.get(name, 1)
    repeated_items = ITEMS // 2 % AT_ONCE.get(name, 1)
    assert sum(first_rows) == ITEMS // 2 * rows_per_item
    assert sum(later_rows) == (ITEMS // 2 + repeated_items) * rows_per_item
    assert measure(subject(1.0, measure(subject(1.0), name)[0]), name)[1] == []


def test_a_measurement_of_an_earlier_version_is_not_continued(
    subject_of: Callable[[str, Task], Callable[..., ShippedModel]],
) -> None:
    subject = subject_of("text", "causal-lm")
    first, _ = measure(subject(0.5), "text")
    old = dataclasses.replace(first, observed={})
    measurement, rows = measure(subject(1.0, old), "text")
    assert sum(rows) == ITEMS
    assert measurement == measure(subject(1.0), "text")[0]


def test_observed_values_are_exact_after_json() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() / 3
    measurement = Measurement({"loss": 1.0}, observed={"losses": values.tolist()})
    assert torch.equal(
        torch.tensor(store_and_load(measurement).observed["losses"], dtype=torch.float64), values
    )
