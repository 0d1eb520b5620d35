"""The residual stream is rotated without a change and cut where it holds least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.layout import LinearSpec
from jobs.models.model import Model
from jobs.techniques.prune_hidden import PruneHidden, ResidualStream, axes, rotate

ROWS = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
RMS, LAYER = ("llama", "qwen3"), ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi")


def answer(model: Model) -> Tensor:
    with torch.no_grad():
        return model.answer(ROWS[:2]).float()


def context(workdir: Path) -> Context:
    return Context(Statistics(None, "parent"), workdir, seed=0, calibration=ROWS)


def shaken(model: Model) -> Model:
    """Norms with weights and biases of their own, which a fresh model has not; all in fp32."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.module.named_parameters():
        parameter.data = parameter.data.float()
        if "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", [*RMS, *LAYER])
def test_a_stream_that_lies_in_the_kept_directions_loses_nothing(
    tiny: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation at full width changes no answer. A LayerNorm's stream has a direction too few, its mean,
    which no reader sees: it fits into the same width."""
    monkeypatch.setattr("jobs.techniques.prune_hidden.DTYPE", torch.float32)
    monkeypatch.setattr(loading, "DTYPE", torch.float32)
    model = shaken(loading.load(tiny(family)))
    goal = answer(model)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotate(model, ResidualStream(model.layout()), axes(noise @ noise.T, 64, centred=family in LAYER))
    torch.testing.assert_close(answer(model), goal, rtol=1e-4, atol=1e-4)


def test_the_axes_hold_more_energy_than_any_other_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) * torch.arange(1, 9)
    gram = x.T @ x
    basis = axes(gram, 3, centred=False)
    held = torch.trace(basis.T @ gram.double() @ basis)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
        assert torch.trace(other.T @ gram.double() @ other) <= held + 1e-6
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))


def test_the_axes_of_a_layer_norm_give_coordinates_of_mean_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    basis = axes(x.T @ x, 5, centred=True)
    assert (x.double() @ basis).mean(dim=-1).abs().max() < 1e-9
    assert basis.sum(dim=0).abs().max() < 1e-9  # a state's own mean is not seen
    assert torch.linalg.matrix_rank(basis) == 4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_less_is_lost_than_by_cutting_in_random_directions(
    tiny: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    folder = tiny(family)
    goal = answer(loading.load(folder))
    model = PruneHidden(ratio=0.25).compress(loading.load(folder), context(tmp_path))
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = loading.load(folder)
    rotate(other, ResidualStream(other.layout()), axes(noise @ noise.T, 48, centred=family in LAYER))
    assert (answer(model) - goal).norm() < (answer(other) - goal).norm()


def test_a_tied_head_becomes_a_matrix_of_its_own(tiny: Callable[..., Path], tmp_path: Path) -> None:
    layout = loading.original_layout(tiny("llama"))
    assert "lm_head" not in layout.tables
    assert PruneHidden(ratio=0.25).output_layout(layout).tables["lm_head"] == LinearSpec(512, 48, bias=False)


def test_norms_in_the_stream_are_refused_with_the_reason(tiny: Callable[..., Path]) -> None:
    for family in ("bert", "gemma3_text"):
        with pytest.raises(ValueError, match=f"prune_hidden does not support {family} .*residual stream"):
            PruneHidden().output_layout(loading.original_layout(tiny(family)))
