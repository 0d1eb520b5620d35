"""The schedule by which compression grows, and the inputs required by techniques that compress during training."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.technique import Technique
from jobs.techniques.anneal_rank import AnnealRank
from jobs.techniques.gradual_prune import GradualPrune
from jobs.techniques.qat import Qat
from jobs.training.schedule import Ramp


def test_compression_grows_by_the_papers_cubic_schedule() -> None:
    ramp = Ramp(4)
    # 1 − (3/4)³ = 37/64, 1 − (1/2)³ = 7/8, 1 − (1/4)³ = 63/64
    assert [ramp.share(completed_steps) for completed_steps in range(6)] == [0, 37 / 64, 7 / 8, 63 / 64, 1, 1]


def test_the_last_step_trains_at_full_compression() -> None:
    for share in (0.0, 0.3, 1.0):
        for steps in (1, 2, 7, 100):
            ramp = Ramp.of(share, steps)
            assert ramp.share(steps - 1) == 1
            assert ramp.is_due(ramp.steps)
    assert Ramp.of(0.5, 100) == Ramp(50)


def test_choices_are_due_at_the_start_about_twenty_times_and_at_the_end() -> None:
    due = [step for step in range(1000) if Ramp(400).is_due(step)]
    assert due == list(range(0, 401, 20))
    assert [step for step in range(10) if Ramp(3).is_due(step)] == [0, 1, 2, 3]
    assert [step for step in range(10) if Ramp(0).is_due(step)] == [0]
    assert 50 in [step for step in range(60) if Ramp(50).is_due(step)]


@pytest.mark.parametrize("step", [Qat(), GradualPrune(), AnnealRank()], ids=lambda step: step.name())
def test_training_without_a_text_is_refused(step: Technique, tiny_llama: Path, tmp_path: Path) -> None:
    context = Context(Statistics(None, ""), tmp_path, 0, teacher=lambda: loading.load(tiny_llama))
    with pytest.raises(ValueError, match=rf"{step.name()} needs the teacher and training text"):
        step.compress(loading.load(tiny_llama), context)
