"""Several ranks train like a single rank at every ZeRO stage: same losses and weights, also after a rank is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.executors.gang import run_gang
from jobs import data, techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.failures import failure
from jobs.job import Failure
from jobs.materials import TextSource
from jobs.models import loading
from jobs.parallel import Sharing
from jobs.progress import JobInterruptedError
from jobs.training import loop
from jobs.training.checkpoints import Checkpoints
from jobs.training.settings import HeldOut, Training, TrainingLog

STAGES = (0, 1, 2, 3)


class UntidyModule(nn.Module):
    """A module with sizes that two ranks can't halve, and with two linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # all ranks must start from the weights of rank 0
        self.first = nn.Linear(7, 7)
        self.second = nn.Linear(7, 7, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((7,), float(torch.rand(()))))
        self.to(torch.bfloat16)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) + self.shift)


def batches(count: int = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 7, generator=generator).bfloat16() for _ in range(count)]


def mse_to_half_input(module: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.mse_loss(module(batch).float(), batch.float() / 2)


def ignore_progress(share: float, activity: str) -> None:
    del share, activity


def current_rank() -> int:
    return int(os.environ.get("RANK", 0))


RunSummary = tuple[list[float], list[float], list[list[float]]]
"""The training losses, the held-out losses and the weights, as plain lists that pass between processes."""


def summarize(log: TrainingLog, module: nn.Module) -> RunSummary:
    return list(log.losses), list(log.held_out), module.first.weight.float().tolist()


def are_close(actual: RunSummary, expected: RunSummary) -> bool:
    """Return whether losses agree within 1 % and weights within two steps of bf16."""
    losses_agree = actual[0] == pytest.approx(expected[0], rel=0.01) and actual[1] == pytest.approx(
        expected[1], rel=0.01
    )
    return losses_agree and torch.allclose(
        torch.tensor(actual[2]), torch.tensor(expected[2]), rtol=0.016, atol=0.004
    )


def run_in_gang(fn: Callable[..., Any], *args: object) -> Any:
    result = run_gang("a", fn, args, 2)
    assert result.error is None, result.error
    return result.value


def only_from_rank_0(value: Any) -> Any:
    if current_rank() != 0:
        return None
    return value


def train_summary(stage: int, **options: Any) -> RunSummary:
    """Train for 20 steps of three batches each, which two ranks cannot share evenly."""
    module = UntidyModule()
    training = Training(1e-2, 20, accumulate=3, zero_stage=stage)
    return summarize(
        loop.train(module, batches(), mse_to_half_input, training, ignore_progress, **options), module
    )


def divergence_message() -> str:
    """Return the error message of a divergence that only the second rank computes."""
    batch_numbers = iter(range(100))

    def diverging_loss(module: nn.Module, batch: Tensor) -> Tensor:
        factor = 1.0
        if next(batch_numbers) == 5 and current_rank() == 1:
            factor = torch.nan
        return mse_to_half_input(module, batch) * factor

    with pytest.raises(FloatingPointError) as raised:
        loop.train(
            UntidyModule(),
            batches(),
            diverging_loss,
            Training(1e-2, 20, accumulate=2, zero_stage=3),
            ignore_progress,
        )
    return str(raised.value)


def train_at_every_stage() -> Any:
    message = divergence_message()
    held_out = HeldOut([*batches(2), batches(1)[0][:5]], interval=5, patience=10)
    short_run = loop.train(
        UntidyModule(),
        batches(),
        mse_to_half_input,
        Training(1e-2, 2, accumulate=1, zero_stage=2),
        ignore_progress,
    )
    return only_from_rank_0(
        (message, [train_summary(stage, held_out=held_out) for stage in STAGES], short_run.losses)
    )


def test_two_ranks_train_like_one_at_every_stage_and_report_the_same_error() -> None:
    message, summaries, gang_losses = run_in_gang(train_at_every_stage)
    assert message == "the loss became nan at step 6"
    held_out = HeldOut([*batches(2), batches(1)[0][:5]], interval=5, patience=10)
    expected = train_summary(0, held_out=held_out)
    assert expected[0][-1] < 0.9 * expected[0][0]
    for stage, summary in zip(STAGES, summaries, strict=True):
        assert are_close(summary, expected), stage
    # With one batch per step the second rank contributes nothing.
    single_run = loop.train(UntidyModule(), batches(), mse_to_half_input, Training(1e-2, 2), ignore_progress)
    assert gang_losses == pytest.approx(single_run.losses, rel=0.01)


def train_until_stopped(folder: Path, stage: int, stop_step: int, stop: Callable[[], None]) -> RunSummary:
    """Train with checkpoints; on the second rank call `stop` in the report of step `stop_step`."""
    shares: list[float] = []

    def report(share: float, activity: str) -> None:
        shares.append(share)
        if activity.startswith(f"step {stop_step} ") and current_rank() == 1:
            stop()

    module = UntidyModule()
    training = Training(1e-2, 20, accumulate=3, zero_stage=stage)
    held_out = HeldOut(batches(2), interval=5, patience=10)
    # Only rank 0 may write checkpoints.
    subfolder = "never"
    if current_rank() == 0:
        subfolder = "kept"
    checkpoints = Checkpoints(folder / subfolder, interval=4)
    return summarize(
        loop.train(
            module, batches(), mse_to_half_input, training, report, held_out=held_out, checkpoints=checkpoints
        ),
        module,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise JobInterruptedError("its node goes away")


def interrupt_twice_and_finish(folder: Path) -> Any:
    """Resume after the killed rank, with two interruptions, each run at another ZeRO stage."""
    completed_steps = []
    for stage, stop_step in ((3, 11), (1, 13)):
        with pytest.raises(JobInterruptedError):
            train_until_stopped(folder, stage, stop_step, interrupt)
        checkpoint = Checkpoints(folder / "kept", 4).read()
        completed_steps.append(None if checkpoint is None else checkpoint.course["done"])
    return only_from_rank_0((completed_steps, train_until_stopped(folder, 2, 0, interrupt)))


def test_training_resumes_after_a_killed_rank_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    killed = run_gang("a", train_until_stopped, (tmp_path, 2, 10, die), 2)
    assert killed.error == "rank 1 of 2 was killed by SIGKILL"
    checkpoint = Checkpoints(tmp_path / "kept", 4).read()
    assert checkpoint is not None
    assert checkpoint.course["done"] == 8
    completed_steps, finished = run_in_gang(interrupt_twice_and_finish, tmp_path)
    assert completed_steps == [11, 13]
    expected = train_summary(0, held_out=HeldOut(batches(2), interval=5, patience=10))
    assert are_close(finished, expected)
    # One rank at stage 0 resumes from the checkpoint that two ranks wrote at stage 2.
    assert are_close(train_until_stopped(tmp_path, 0, 0, interrupt), expected)
    assert not (tmp_path / "never").exists()


def run_out_of_memory() -> Failure | None:
    def raise_on_second_rank(module: nn.Module, batch: Tensor) -> Tensor:
        if current_rank() == 1:
            raise MemoryError("no more")
        return mse_to_half_input(module, batch)

    try:
        loop.train(
            UntidyModule(),
            batches(),
            raise_on_second_rank,
            Training(1e-2, 5, accumulate=2, zero_stage=3),
            ignore_progress,
        )
    except Exception as error:  # noqa: BLE001 - a worker catches every exception too
        return failure(error)
    return None


def test_a_gang_fails_with_the_failure_of_its_rank() -> None:
    assert run_in_gang(run_out_of_memory).kind == "out_of_memory"


STEPS: dict[str, dict[str, Any]] = {
    "distill": {"steps": 20, "batch": 6, "learning_rate": 3e-4, "patience": 5},
    "finetune": {"steps": 10, "batch": 5, "learning_rate": 3e-3, "method": "full"},
    "gradual_prune": {"steps": 6, "batch": 4, "learning_rate": 3e-3, "sparsity": 0.5},
}
RUNS = [*(("distill", stage) for stage in STAGES), ("finetune", 0), ("finetune", 3), ("gradual_prune", 2)]


def retrain(name: str, folder: Path, text: Path, sharing: Sharing) -> tuple[list[str], Any, list[float]]:
    """Retrain a damaged model; return its progress reports, its notes and some logits."""
    activities: list[str] = []
    text_rows = data.windows_for(TextSource(str(text), 32, 32), folder)
    context = Context(
        statistics=Statistics(None, "parent"),
        workdir=folder,
        seed=0,
        training=text_rows,
        teacher=lambda: loading.load(folder),
        teacher_statistics=Statistics(None, "original"),
        sharing=sharing,
        report=lambda share, activity: activities.append(activity),
    )
    model = loading.load(folder)
    with torch.no_grad():  # damage that can be recovered from
        model.blocks[1].mlp.down_proj.weight.zero_()
    techniques.load(name).of(STEPS[name]).compress(model, context)
    with torch.no_grad():
        logits = model.module(text_rows[:1]).logits.float()[0, -1, :20].tolist()
    return [activity for activity in activities if activity.startswith("step ")], context.notes, logits


def retrain_all(folder: Path, text: Path) -> Any:
    results = {run: retrain(run[0], folder, text, Sharing(zero_stage=run[1])) for run in RUNS}
    return only_from_rank_0(results)


def losses_of(activities: list[str]) -> list[float]:
    return [float(activity.rpartition(" ")[2]) for activity in activities]


def test_retraining_on_two_ranks_follows_the_loss_curve_of_one_rank(
    tiny_llama: Path, text_file: Path
) -> None:
    expected = {name: retrain(name, tiny_llama, text_file, Sharing()) for name in STEPS}
    for (name, stage), (activities, notes, logits) in run_in_gang(retrain_all, tiny_llama, text_file).items():
        expected_activities, expected_notes, expected_logits = expected[name]
        # Losses are reported with four digits. Of two weights of nearly equal size, either may be masked.
        tolerance = 0.01
        if name == "gradual_prune":
            tolerance = 0.05
        assert losses_of(activities) == pytest.approx(
            losses_of(expected_activities), rel=tolerance, abs=1e-4
        ), (name, stage)
        assert notes.get("steps_taken") == expected_notes.get("steps_taken")
        assert notes.get("held_out_losses", []) == pytest.approx(
            expected_notes.get("held_out_losses", []), rel=0.01
        )
        assert logits == pytest.approx(expected_logits, abs=0.05), (name, stage)
    initial_loss, *later_losses = expected["distill"][1]["held_out_losses"]
    assert min(later_losses) < initial_loss


def test_a_zero_stage_that_the_training_does_not_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.zero_stage=3"):
        replace(Sharing(), zero_stage=3).stage(100, 2, 1.0, highest=2)
