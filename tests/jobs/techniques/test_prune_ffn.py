"""Pruning of feed-forward layers: corrections reduce the error, and widths stay multiples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.techniques.prune_ffn import PruneFfn, kept_width, refit


def make_tokens() -> torch.Tensor:
    return torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))


def output_error(folder: Path, correction: str, ratio: float, workdir: Path) -> float:
    """Return the mean squared error of the first feed-forward output on the calibration text."""
    captured: dict[str, torch.Tensor] = {}
    outputs = []
    for step in (None, PruneFfn(ratio=ratio, correction=correction)):
        model = loading.load(folder)
        if step is not None:
            step.compress(model, Context(Statistics(None, ""), workdir, 0, calibration=make_tokens()))
        hook = model.blocks[0].mlp.register_forward_hook(lambda m, a, out: captured.update(out=out.float()))
        model.module(make_tokens())
        hook.remove()
        outputs.append(captured["out"])
    return (outputs[1] - outputs[0]).square().mean().item()


def test_least_squares_has_a_smaller_error_than_no_correction(tiny_llama: Path, tmp_path: Path) -> None:
    none, solved = (
        output_error(tiny_llama, correction, 0.5, tmp_path) for correction in ("none", "least_squares")
    )
    assert solved < 0.9 * none


def test_the_error_grows_with_the_ratio(tiny_llama: Path, tmp_path: Path) -> None:
    errors = [output_error(tiny_llama, "least_squares", ratio, tmp_path) for ratio in (0.1, 0.4, 0.8)]
    assert errors == sorted(errors)


def test_the_correction_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, kept_neurons = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 9])
    solved = refit(weight, activations.T @ activations / 500, kept_neurons)
    expected = torch.linalg.lstsq(activations[:, kept_neurons], activations @ weight.T).solution.T
    assert torch.allclose(solved, expected, atol=0.02)


def test_a_removed_duplicate_of_a_neuron_is_compensated_exactly() -> None:
    # Neuron 1 always equals neuron 0, so the weight of neuron 0 becomes the sum of both weights.
    gram = torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    solved = refit(torch.tensor([[1.0, 2.0]]), gram, torch.tensor([0]))
    assert solved.item() == pytest.approx(3.0, rel=1e-3)


def test_a_constant_neuron_is_compensated_by_the_bias(tiny_bert: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_bert)
    block = model.blocks[0]
    block.intermediate.dense.weight[:8] = 0
    block.intermediate.dense.bias[:8] = 2.0
    original_states = model.module(make_tokens()).last_hidden_state
    context = Context(Statistics(None, ""), tmp_path, 0, calibration=make_tokens())
    for later_block in model.blocks[1:]:
        later_block.intermediate.dense.weight[-8:] = 0
        later_block.intermediate.dense.bias[-8:] = 0
    original_states = model.module(make_tokens()).last_hidden_state
    PruneFfn(ratio=0.05, correction="bias").compress(model, context)
    assert block.output.dense.in_features == 152
    assert torch.allclose(model.module(make_tokens()).last_hidden_state, original_states, atol=0.06)


@pytest.mark.parametrize(
    ("width", "ratio", "expected"),
    [(1536, 0.25, 1152), (1536, 0.01, 1536), (160, 0.5, 80), (160, 0.9, 16), (8, 0.9, 8), (4, 0.9, 4)],
)
def test_kept_widths_are_multiples(width: int, ratio: float, expected: int) -> None:
    assert kept_width(width, ratio) == expected
