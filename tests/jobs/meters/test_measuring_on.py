"""Measuring on from where an earlier measurement ended gives, bit for bit, what measuring all at once gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import meters
from jobs.job import Success as Done
from jobs.job import outcome_from_dict, outcome_to_dict
from jobs.materials import Materials, TextSource
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel
from jobs.models.families import Task

ITEMS = 24
TOKENS = {"text": 100, "agreement": 100}
AT_ONCE = {"text": 5, "agreement": 10}
"""Windows of so many tokens, by so many in a batch, which divides neither the rungs nor the whole."""
CASES: list[tuple[str, Task]] = [
    ("text", "causal-lm"),
    ("agreement", "embedding"),
    ("choices", "causal-lm"),
    ("labels", "classification"),
]


class Counting:
    """A runner that notes how many rows it is given each time."""

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

    def made(name: str, task: Task) -> Callable[..., ShippedModel]:
        model = tiny(*{"causal-lm": ("llama",), "embedding": ("bert",)}.get(task, ("bert", "classification")))
        source = TextSource(str(text_file), ITEMS, TOKENS.get(name, 16))
        materials = Materials(
            str(model), task, source, choices=str(tmp_path / "choices"), labelled=str(tmp_path / "labels")
        )
        return lambda fidelity, before=None: ShippedModel(
            model, model, materials, fidelity, before=None if before is None else stored(before)
        )

    return made


def stored(measurement: Measurement) -> Measurement:
    """As it comes back from a record of the store."""
    done = Done("artifact", 1, measurement, 1.0)
    again = outcome_from_dict(json.loads(json.dumps(outcome_to_dict(done))))
    assert isinstance(again, Done)
    return again.measurement


def read(subject: ShippedModel, meter: str) -> tuple[Measurement, list[int]]:
    """What the meter finds, and how many rows went through the model at a time."""
    counting = Counting(subject.runner)
    subject.__dict__["runner"] = counting  # where a cached property lies
    return meters.load(meter).measure(subject), counting.rows


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("rungs", [(0.25, 1.0), (1 / 12, 0.3, 0.7, 1.0), (0.25, 0.26, 1.0)])
def test_every_bit_is_that_of_measuring_all_at_once(
    name: str,
    task: Task,
    rungs: Sequence[float],
    subject_of: Callable[[str, Task], Callable[..., ShippedModel]],
) -> None:
    subject = subject_of(name, task)
    found = None
    for rung in rungs:
        found, _ = read(subject(rung, found), name)
        at_once, _ = read(subject(rung), name)
        assert found == at_once
        assert {len(items) for items in found.items.values()} == {subject(rung).items_of(ITEMS)}


@pytest.mark.parametrize(("name", "task"), CASES)
def test_only_what_was_not_in_a_whole_batch_is_read(
    name: str, task: Task, subject_of: Callable[[str, Task], Callable[..., ShippedModel]]
) -> None:
    subject = subject_of(name, task)
    first, begun = read(subject(0.5), name)
    _, rest = read(subject(1.0, first), name)
    each = {"choices": 2}.get(name, 1)
    again = ITEMS // 2 % AT_ONCE.get(name, 1)
    assert sum(begun) == ITEMS // 2 * each
    assert sum(rest) == (ITEMS // 2 + again) * each
    assert read(subject(1.0, read(subject(1.0), name)[0]), name)[1] == []


def test_what_an_earlier_version_found_is_not_gone_on_from(
    subject_of: Callable[[str, Task], Callable[..., ShippedModel]],
) -> None:
    subject = subject_of("text", "causal-lm")
    first, _ = read(subject(0.5), "text")
    old = dataclasses.replace(first, observed={})
    found, rows = read(subject(1.0, old), "text")
    assert sum(rows) == ITEMS
    assert found == read(subject(1.0), "text")[0]


def test_what_was_seen_of_each_item_is_exact_after_json() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() / 3
    given = Measurement({"loss": 1.0}, observed={"losses": values.tolist()})
    assert torch.equal(torch.tensor(stored(given).observed["losses"], dtype=torch.float64), values)
