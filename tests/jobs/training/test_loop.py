"""Training through DeepSpeed: it learns, is repeatable at every ZeRO stage, stops when it diverges, leaves no trace."""

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
    """Two linears that share one weight."""

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


def rows(count: int = 1000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 8, generator=generator).bfloat16() for _ in range(count)]


def off(module: nn.Module, batch: Tensor) -> Tensor:
    """How far the module is from halving its input."""
    return nn.functional.mse_loss(module(batch).float(), batch.float() / 2)


def quiet(share: float, what: str) -> None:
    del share, what


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_learns_the_same_and_leaves_a_plain_module(stage: int) -> None:
    expected = Net()
    plain = loop.train(expected, rows(), off, Training(1e-2, 30), quiet)
    module = Net()
    log = loop.train(module, rows(), off, Training(1e-2, 30, zero_stage=stage), quiet)
    assert log.losses[-1] < 0.8 * log.losses[0]
    assert log.losses == pytest.approx(plain.losses, rel=0.1)
    assert module.second.weight is module.first.weight
    assert {type(parameter) for parameter in module.parameters()} == {nn.Parameter}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not module.training
    torch.testing.assert_close(module.first.weight, expected.first.weight, rtol=0.05, atol=0.01)


def test_what_requires_no_gradient_stays() -> None:
    module = Net()
    module.first.weight.requires_grad_(False)
    before = module.first.weight.clone()
    loop.train(module, rows(), off, Training(1e-2, 5), quiet)
    assert torch.equal(module.first.weight, before)
    assert not torch.equal(module.first.bias, Net().first.bias)


def test_the_same_training_twice_gives_the_same_weights() -> None:
    one, other = Net(), Net()
    for module in (one, other):
        loop.train(module, rows(), off, Training(1e-2, 5), quiet)
    assert torch.equal(one.first.weight, other.first.weight)


def test_masters_of_fp32_keep_updates_too_small_for_bf16() -> None:
    module = Net()
    before = module.first.weight.clone()
    # One step of 1e-4 is below half of bf16's spacing at most of these weights; forty add up.
    loop.train(module, rows(), off, Training(1e-4, 40, warmup=0.0, decay="linear"), quiet)
    large = before.abs() > 0.125
    assert (module.first.weight != before)[large].float().mean() > 0.5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_updates_are_adams(stage: int) -> None:
    """Of a gradient that stays the same, Adam's every update is as long as the rate."""
    module = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.zeros_(module.weight)

    def slope(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).float().mean()

    fixed = torch.ones(32, 8).bfloat16()
    training = Training(1e-2, 3, warmup=0.0, decay="linear", zero_stage=stage)
    loop.train(module, [fixed] * 3, slope, training, quiet)
    moved = sum(training.rate(step) for step in range(3))
    torch.testing.assert_close(module.weight.float(), torch.full((8, 8), -moved), rtol=0.01, atol=0)


def test_gathering_gradients_over_two_batches_equals_one_batch_of_both() -> None:
    halves = rows()
    wholes = [torch.cat(pair) for pair in zip(halves[::2], halves[1::2], strict=True)]
    one, other = Net(), Net()
    loop.train(one, halves, off, Training(1e-2, 5, accumulate=2), quiet)
    loop.train(other, wholes, off, Training(1e-2, 5), quiet)
    torch.testing.assert_close(one.first.weight, other.first.weight, rtol=0.05, atol=0.01)


def test_a_loss_that_is_not_finite_stops_the_training_and_frees_the_module() -> None:
    module = Net()
    with pytest.raises(FloatingPointError, match="at step 1"):
        loop.train(module, rows(), lambda m, x: m(x).float().sum() * math.nan, Training(1e-2, 5), quiet)
    assert {type(parameter) for parameter in module.parameters()} == {nn.Parameter}
    assert math.isfinite(loop.train(module, rows(), off, _trainable(module), quiet).losses[0])


def _trainable(module: nn.Module) -> Training:
    module.requires_grad_(True)
    return Training(1e-2, 1)


def test_a_loss_that_rises_far_above_its_start_stops_the_training() -> None:
    grows = iter(range(1000))

    def growing(module: nn.Module, batch: Tensor) -> Tensor:
        return off(module, batch) * (1 + next(grows) ** 2)

    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        loop.train(Net(), rows(), growing, Training(1e-6, 50), quiet)


def test_a_loss_may_rise_further_where_the_model_is_changed_between_steps() -> None:
    def rising(to: float) -> settings.LossOf:
        steps = iter(range(1000))
        return lambda module, batch: off(module, batch) * 0 + min(1.0, next(steps) / 12) * to

    def nothing_of_note(done: int) -> None:
        pass

    training = Training(1e-6, 16)
    with pytest.raises(FloatingPointError):
        loop.train(Net(), rows(), rising(3.0), training, quiet)
    found = loop.train(Net(), rows(), rising(3.0), training, quiet, after_step=nothing_of_note)
    assert len(found.losses) == 16
    with pytest.raises(FloatingPointError):
        loop.train(Net(), rows(), rising(30.0), training, quiet, after_step=nothing_of_note)


def test_the_rate_rises_then_falls_and_is_never_zero() -> None:
    for decay in ("cosine", "linear"):
        training = Training(1.0, 20, warmup=0.2, decay=decay)
        rates = [training.rate(step) for step in range(20)]
        assert max(rates) == 1.0
        assert rates[:4] == sorted(rates[:4])
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert min(rates) > 0


def test_every_step_is_reported() -> None:
    shares: list[float] = []
    loop.train(Net(), rows(), off, Training(1e-3, 4), lambda share, what: shares.append(share))
    assert shares == [0.25, 0.5, 0.75, 1.0]


class Masked(nn.Module):
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
    before = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Masked(mask))
    done: list[int] = []
    loop.train(module, rows(), off, Training(1e-2, 6, zero_stage=stage), quiet, after_step=done.append)
    hidden = module.get_parameter("parametrizations.weight.original")
    assert torch.equal(hidden[mask == 0], before[mask == 0])
    parametrize.remove_parametrizations(module, "weight")
    assert not module.weight[mask == 0].any()
    assert not torch.equal(module.weight[mask == 1], before[mask == 1])
    assert done == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", [0, 3])
def test_training_stops_when_held_out_rows_get_worse_and_leaves_the_best_weights(stage: int) -> None:
    """After 20 steps it is asked for the opposite of what it is judged by."""
    wishes = [torch.cat([x, x / 2 if step < 20 else -x], dim=1) for step, x in enumerate(rows(400))]
    held = settings.HeldOut([torch.cat([x, x / 2], dim=1) for x in rows(2)], every=5, patience=2)

    def wished(module: nn.Module, batch: Tensor) -> Tensor:
        x, goal = batch.chunk(2, dim=1)
        return nn.functional.mse_loss(module(x).float(), goal.float())

    module = Net()
    log = loop.train(module, wishes, wished, Training(1e-2, 400, zero_stage=stage), quiet, held_out=held)
    best = log.held_out.index(min(log.held_out))
    assert best > 0
    assert len(log.losses) == 5 * (len(log.held_out) - 1) == 5 * (best + 2) < 400
    with torch.no_grad():
        left = sum(wished(module, batch).item() for batch in held.batches) / 2
    assert left == pytest.approx(min(log.held_out), rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_training_interrupted_and_called_again_ends_as_one_that_was_not(stage: int, tmp_path: Path) -> None:
    training = Training(1e-2, 12, accumulate=2, zero_stage=stage)
    held = settings.HeldOut(rows(2), every=3, patience=10)
    whole = Net()
    expected = loop.train(whole, rows(), off, training, quiet, held_out=held)
    places = Checkpoints(tmp_path / "checkpoints", every=4)
    told: list[int] = []

    def interrupt(done: int) -> None:
        told.append(done)
        if done == 10 and len(told) == 10:
            raise JobInterruptedError

    module = Net()
    for _ in range(2):
        with contextlib.suppress(JobInterruptedError):
            log = loop.train(
                module, rows(), off, training, quiet, after_step=interrupt, held_out=held, checkpoints=places
            )
            break
        module = Net()
    assert told == [*range(1, 11), 8, 9, 10, 11, 12]
    assert log.losses == pytest.approx(expected.losses, rel=1e-6)
    assert log.held_out == pytest.approx(expected.held_out, rel=1e-6)
    torch.testing.assert_close(module.first.weight, whole.first.weight, rtol=1e-6, atol=0)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    places = Checkpoints(tmp_path, every=1)
    loop.train(Net(), rows(), off, Training(1e-3, 2), quiet, checkpoints=places)
    with pytest.raises(ValueError, match="another training"):
        loop.train(Net(), rows(), off, Training(1e-4, 2), quiet, checkpoints=places)
