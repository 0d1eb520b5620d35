"""Training with DeepSpeed: it learns, repeats at every ZeRO stage, stops on divergence, and cleans up."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jobs.progress import JobInterruptedError
from jobs.training import loop, settings
from jobs.training.checkpoints import Checkpoints
from jobs.training.settings import Training


class Net(nn.Module):
    """A module of two linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.to(torch.bfloat16)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def batches(count: int = 1000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 8, generator=generator).bfloat16() for _ in range(count)]


def mse_to_half_input(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the squared error of the module against half of its input."""
    return nn.functional.mse_loss(module(batch).float(), batch.float() / 2)


def ignore_progress(share: float, activity: str) -> None:
    del share, activity


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_learns_the_same_and_leaves_a_plain_module(stage: int) -> None:
    expected = Net()
    plain = loop.train(expected, batches(), mse_to_half_input, Training(1e-2, 30), ignore_progress)
    module = Net()
    log = loop.train(
        module, batches(), mse_to_half_input, Training(1e-2, 30, zero_stage=stage), ignore_progress
    )
    assert log.losses[-1] < 0.8 * log.losses[0]
    assert log.losses == pytest.approx(plain.losses, rel=0.1)
    assert module.second.weight is module.first.weight
    assert {type(parameter) for parameter in module.parameters()} == {nn.Parameter}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not module.training
    torch.testing.assert_close(module.first.weight, expected.first.weight, rtol=0.05, atol=0.01)


def test_frozen_weights_do_not_change() -> None:
    module = Net()
    module.first.weight.requires_grad_(False)
    original_weight = module.first.weight.clone()
    loop.train(module, batches(), mse_to_half_input, Training(1e-2, 5), ignore_progress)
    assert torch.equal(module.first.weight, original_weight)
    assert not torch.equal(module.first.bias, Net().first.bias)


def test_a_repeated_training_gives_the_same_weights() -> None:
    first_run, second_run = Net(), Net()
    for module in (first_run, second_run):
        loop.train(module, batches(), mse_to_half_input, Training(1e-2, 5), ignore_progress)
    assert torch.equal(first_run.first.weight, second_run.first.weight)


def test_fp32_master_weights_keep_updates_too_small_for_bf16() -> None:
    module = Net()
    initial_weight = module.first.weight.clone()
    # A step of 1e-4 is below half of bf16's spacing for most of these weights; forty steps add up.
    loop.train(
        module, batches(), mse_to_half_input, Training(1e-4, 40, warmup=0.0, decay="linear"), ignore_progress
    )
    large = initial_weight.abs() > 0.125
    assert (module.first.weight != initial_weight)[large].float().mean() > 0.5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_updates_equal_those_of_adam(stage: int) -> None:
    """With a constant gradient, each update of Adam is as large as the learning rate."""
    module = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.zeros_(module.weight)

    def slope(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).float().mean()

    fixed = torch.ones(32, 8).bfloat16()
    training = Training(1e-2, 3, warmup=0.0, decay="linear", zero_stage=stage)
    loop.train(module, [fixed] * 3, slope, training, ignore_progress)
    total_update = sum(training.rate(step) for step in range(3))
    torch.testing.assert_close(module.weight.float(), torch.full((8, 8), -total_update), rtol=0.01, atol=0)


def test_accumulating_gradients_over_two_batches_equals_one_batch_of_both() -> None:
    small_batches = batches()
    large_batches = [torch.cat(pair) for pair in zip(small_batches[::2], small_batches[1::2], strict=True)]
    accumulated, direct = Net(), Net()
    loop.train(
        accumulated, small_batches, mse_to_half_input, Training(1e-2, 5, accumulate=2), ignore_progress
    )
    loop.train(direct, large_batches, mse_to_half_input, Training(1e-2, 5), ignore_progress)
    torch.testing.assert_close(accumulated.first.weight, direct.first.weight, rtol=0.05, atol=0.01)


def test_a_non_finite_loss_stops_the_training_and_releases_the_module() -> None:
    module = Net()
    with pytest.raises(FloatingPointError, match="at step 1"):
        loop.train(
            module, batches(), lambda m, x: m(x).float().sum() * math.nan, Training(1e-2, 5), ignore_progress
        )
    assert {type(parameter) for parameter in module.parameters()} == {nn.Parameter}
    assert math.isfinite(
        loop.train(
            module, batches(), mse_to_half_input, _unfreeze_for_one_step(module), ignore_progress
        ).losses[0]
    )


def _unfreeze_for_one_step(module: nn.Module) -> Training:
    module.requires_grad_(True)
    return Training(1e-2, 1)


def test_a_loss_that_rises_far_above_its_start_stops_the_training() -> None:
    batch_numbers = iter(range(1000))

    def growing_loss(module: nn.Module, batch: Tensor) -> Tensor:
        return mse_to_half_input(module, batch) * (1 + next(batch_numbers) ** 2)

    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        loop.train(Net(), batches(), growing_loss, Training(1e-6, 50), ignore_progress)


def test_a_loss_may_rise_further_if_the_model_is_changed_between_steps() -> None:
    def rising_loss(highest: float) -> settings.LossOf:
        steps = iter(range(1000))
        return lambda module, batch: (
            mse_to_half_input(module, batch) * 0 + min(1.0, next(steps) / 12) * highest
        )

    def ignore_step(completed_steps: int) -> None:
        pass

    training = Training(1e-6, 16)
    with pytest.raises(FloatingPointError):
        loop.train(Net(), batches(), rising_loss(3.0), training, ignore_progress)
    log = loop.train(Net(), batches(), rising_loss(3.0), training, ignore_progress, after_step=ignore_step)
    assert len(log.losses) == 16
    with pytest.raises(FloatingPointError):
        loop.train(Net(), batches(), rising_loss(30.0), training, ignore_progress, after_step=ignore_step)


def test_the_learning_rate_rises_then_falls_and_is_never_zero() -> None:
    for decay in ("cosine", "linear"):
        training = Training(1.0, 20, warmup=0.2, decay=decay)
        rates = [training.rate(step) for step in range(20)]
        assert max(rates) == 1.0
        assert rates[:4] == sorted(rates[:4])
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert min(rates) > 0


def test_every_step_is_reported() -> None:
    shares: list[float] = []
    loop.train(
        Net(), batches(), mse_to_half_input, Training(1e-3, 4), lambda share, activity: shares.append(share)
    )
    assert shares == [0.25, 0.5, 0.75, 1.0]


class MaskWeight(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_masked_in_the_forward_pass_stay_zero_and_the_others_learn(stage: int) -> None:
    module = nn.Linear(8, 8).to(torch.bfloat16)
    mask = (torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) > 0.5).bfloat16()
    initial_weight = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", MaskWeight(mask))
    completed_steps: list[int] = []
    loop.train(
        module,
        batches(),
        mse_to_half_input,
        Training(1e-2, 6, zero_stage=stage),
        ignore_progress,
        after_step=completed_steps.append,
    )
    masked_weight = module.get_parameter("parametrizations.weight.original")
    assert torch.equal(masked_weight[mask == 0], initial_weight[mask == 0])
    parametrize.remove_parametrizations(module, "weight")
    assert not module.weight[mask == 0].any()
    assert not torch.equal(module.weight[mask == 1], initial_weight[mask == 1])
    assert completed_steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", [0, 3])
def test_early_stopping_restores_the_weights_of_the_best_held_out_loss(stage: int) -> None:
    """After 20 steps the training target becomes the opposite of the held-out target."""
    inputs = batches(400)
    training_pairs = [torch.cat([x, x / 2], dim=1) for x in inputs[:20]]
    training_pairs += [torch.cat([x, -x], dim=1) for x in inputs[20:]]
    held_out = settings.HeldOut([torch.cat([x, x / 2], dim=1) for x in batches(2)], interval=5, patience=2)

    def pair_loss(module: nn.Module, batch: Tensor) -> Tensor:
        x, target = batch.chunk(2, dim=1)
        return nn.functional.mse_loss(module(x).float(), target.float())

    module = Net()
    log = loop.train(
        module,
        training_pairs,
        pair_loss,
        Training(1e-2, 400, zero_stage=stage),
        ignore_progress,
        held_out=held_out,
    )
    best = log.held_out.index(min(log.held_out))
    assert best > 0
    assert len(log.losses) == 5 * (len(log.held_out) - 1) == 5 * (best + 2) < 400
    with torch.no_grad():
        final_loss = sum(pair_loss(module, batch).item() for batch in held_out.batches) / 2
    assert final_loss == pytest.approx(min(log.held_out), rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_interrupted_training_resumes_and_ends_like_an_uninterrupted_one(
    stage: int, tmp_path: Path
) -> None:
    training = Training(1e-2, 12, accumulate=2, zero_stage=stage)
    held_out = settings.HeldOut(batches(2), interval=3, patience=10)
    uninterrupted = Net()
    expected = loop.train(
        uninterrupted, batches(), mse_to_half_input, training, ignore_progress, held_out=held_out
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", interval=4)
    step_numbers: list[int] = []

    def interrupt(completed_steps: int) -> None:
        step_numbers.append(completed_steps)
        if completed_steps == 10 and len(step_numbers) == 10:
            raise JobInterruptedError

    module = Net()
    for _ in range(2):
        with contextlib.suppress(JobInterruptedError):
            log = loop.train(
                module,
                batches(),
                mse_to_half_input,
                training,
                ignore_progress,
                after_step=interrupt,
                held_out=held_out,
                checkpoints=checkpoints,
            )
            break
        module = Net()
    assert step_numbers == [*range(1, 11), 8, 9, 10, 11, 12]
    assert log.losses == pytest.approx(expected.losses, rel=1e-6)
    assert log.held_out == pytest.approx(expected.held_out, rel=1e-6)
    torch.testing.assert_close(module.first.weight, uninterrupted.first.weight, rtol=1e-6, atol=0)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, interval=1)
    loop.train(
        Net(), batches(), mse_to_half_input, Training(1e-3, 2), ignore_progress, checkpoints=checkpoints
    )
    with pytest.raises(ValueError, match="another training"):
        loop.train(
            Net(), batches(), mse_to_half_input, Training(1e-4, 2), ignore_progress, checkpoints=checkpoints
        )
