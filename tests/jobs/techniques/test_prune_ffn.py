from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.techniques.prune_ffn import PruneFfn, kept_width, refit


def tokens() -> torch.Tensor:
    return torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))


def error(folder: Path, correction: str, ratio: float, workdir: Path) -> float:
    """How far the first block's feed-forward output is off on the calibration text, on average."""
    seen: dict[str, torch.Tensor] = {}
    outputs = []
    for step in (None, PruneFfn(ratio=ratio, correction=correction)):
        model = loading.load(folder)
        if step is not None:
            step.compress(model, Context(Statistics(None, ""), workdir, 0, calibration=tokens()))
        hook = model.blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.update(out=out.float()))
        model.module(tokens())
        hook.remove()
        outputs.append(seen["out"])
    return (outputs[1] - outputs[0]).square().mean().item()


def test_least_squares_beats_leaving_the_rest_alone(tiny_llama: Path, tmp_path: Path) -> None:
    none, solved = (error(tiny_llama, way, 0.5, tmp_path) for way in ("none", "least_squares"))
    assert solved < 0.9 * none


def test_the_error_grows_with_the_ratio(tiny_llama: Path, tmp_path: Path) -> None:
    errors = [error(tiny_llama, "least_squares", ratio, tmp_path) for ratio in (0.1, 0.4, 0.8)]
    assert errors == sorted(errors)


def test_the_correction_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, kept = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 9])
    solved = refit(weight, activations.T @ activations / 500, kept)
    expected = torch.linalg.lstsq(activations[:, kept], activations @ weight.T).solution.T
    assert torch.allclose(solved, expected, atol=0.02)


def test_a_removed_copy_of_a_neuron_is_made_up_for_wholly() -> None:
    # Neuron 1 always fires like neuron 0: keeping 0 alone, its weight becomes the sum of both.
    gram = torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    solved = refit(torch.tensor([[1.0, 2.0]]), gram, torch.tensor([0]))
    assert solved.item() == pytest.approx(3.0, rel=1e-3)


def test_a_neuron_that_never_changes_is_made_up_for_by_the_bias(tiny_bert: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_bert)
    block = model.blocks[0]
    block.intermediate.dense.weight[:8] = 0
    block.intermediate.dense.bias[:8] = 2.0
    before = model.module(tokens()).last_hidden_state
    context = Context(Statistics(None, ""), tmp_path, 0, calibration=tokens())
    for other in model.blocks[1:]:
        other.intermediate.dense.weight[-8:] = 0
        other.intermediate.dense.bias[-8:] = 0
    before = model.module(tokens()).last_hidden_state
    PruneFfn(ratio=0.05, correction="bias").compress(model, context)
    assert block.output.dense.in_features == 152
    assert torch.allclose(model.module(tokens()).last_hidden_state, before, atol=0.06)


@pytest.mark.parametrize(
    ("width", "ratio", "kept"),
    [(1536, 0.25, 1152), (1536, 0.01, 1536), (160, 0.5, 80), (160, 0.9, 16), (8, 0.9, 8), (4, 0.9, 4)],
)
def test_widths_stay_multiples(width: int, ratio: float, kept: int) -> None:
    assert kept_width(width, ratio) == kept
