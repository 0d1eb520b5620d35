"""The residual stream is rotated without changing outputs and truncated in the directions of least energy."""

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


def compute_outputs(model: Model) -> Tensor:
    with torch.no_grad():
        return model.answer(ROWS[:2]).float()


def context(workdir: Path) -> Context:
    return Context(Statistics(None, "parent"), workdir, seed=0, calibration=ROWS)


def perturb_norms(model: Model) -> Model:
    """Give norms non-trivial weights and biases, which a new model lacks, and convert all to fp32."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.module.named_parameters():
        parameter.data = parameter.data.float()
        if "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", [*RMS, *LAYER])
def test_a_rotation_at_full_width_changes_no_output(
    tiny: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream of a LayerNorm has one direction fewer, since no linear reads its mean; it fits the same width."""
    monkeypatch.setattr("jobs.techniques.prune_hidden.DTYPE", torch.float32)
    monkeypatch.setattr(loading, "DTYPE", torch.float32)
    model = perturb_norms(loading.load(tiny(family)))
    expected = compute_outputs(model)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotate(model, ResidualStream(model.layout()), axes(noise @ noise.T, 64, centred=family in LAYER))
    torch.testing.assert_close(compute_outputs(model), expected, rtol=1e-4, atol=1e-4)


def test_the_axes_have_more_energy_than_other_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) * torch.arange(1, 9)
    gram = x.T @ x
    basis = axes(gram, 3, centred=False)
    energy = torch.trace(basis.T @ gram.double() @ basis)
    for _ in range(20):
        random_basis = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
        assert torch.trace(random_basis.T @ gram.double() @ random_basis) <= energy + 1e-6
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))


def test_the_axes_of_a_layer_norm_give_coordinates_of_mean_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    basis = axes(x.T @ x, 5, centred=True)
    assert (x.double() @ basis).mean(dim=-1).abs().max() < 1e-9
    assert basis.sum(dim=0).abs().max() < 1e-9  # the mean of a state has no effect
    assert torch.linalg.matrix_rank(basis) == 4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_error_is_smaller_than_with_random_directions(
    tiny: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    folder = tiny(family)
    expected = compute_outputs(loading.load(folder))
    model = PruneHidden(ratio=0.25).compress(loading.load(folder), context(tmp_path))
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    random_model = loading.load(folder)
    rotate(
        random_model,
        ResidualStream(random_model.layout()),
        axes(noise @ noise.T, 48, centred=family in LAYER),
    )
    assert (compute_outputs(model) - expected).norm() < (compute_outputs(random_model) - expected).norm()


def test_a_tied_head_becomes_a_separate_matrix(tiny: Callable[..., Path], tmp_path: Path) -> None:
    layout = loading.original_layout(tiny("llama"))
    assert "lm_head" not in layout.tables
    assert PruneHidden(ratio=0.25).output_layout(layout).tables["lm_head"] == LinearSpec(512, 48, bias=False)


def test_norms_in_the_stream_are_refused_with_the_reason(tiny: Callable[..., Path]) -> None:
    for family in ("bert", "gemma3_text"):
        with pytest.raises(ValueError, match=f"prune_hidden does not support {family} .*residual stream"):
            PruneHidden().output_layout(loading.original_layout(tiny(family)))
