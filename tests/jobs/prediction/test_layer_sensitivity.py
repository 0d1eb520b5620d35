"""The measured sensitivity of a single block equals that of the whole model with only this block compressed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.materials import Materials, TextSource
from jobs.models import loading
from jobs.prediction.layer_sensitivity import _Batch, divergence, measure_layer_sensitivity
from jobs.recipe import Origin, Recipe
from jobs.runtimes.on_torch import unpacked
from jobs.technique import Technique
from jobs.techniques.drop_layers import DropLayers
from jobs.techniques.gptq import Gptq
from jobs.techniques.rtn import Rtn


def materials(model: Path, text_file: Path) -> Materials:
    text = TextSource(str(text_file), 8, 32)
    task = loading.task_of(model)
    return Materials(str(model), task, calibration=text)


def recipe_of(step: Technique) -> Recipe:
    return Recipe(Origin("model", "data", 0), (step,))


def ignore_progress(share: float, activity: str) -> None:
    pass


def test_the_divergence_of_logits_is_zero_or_the_kl_divergence() -> None:
    expected, actual = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    assert divergence(expected, expected, "causal-lm") == 0.0
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(expected, actual, "causal-lm") == pytest.approx(by_hand, rel=1e-6)
    assert divergence(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "classification") == 4.0
    assert divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), "embedding") == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3_text", "distilbert"])
def test_a_single_blocks_sensitivity_equals_that_in_the_whole_model(
    family: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = tiny(family)
    data_sources, step = materials(folder, text_file), Rtn(bits=2, embedding_bits=4)
    sensitivity = measure_layer_sensitivity([recipe_of(step)], data_sources, tmp_path, ignore_progress)[0]
    original, context = loading.load(folder), Context(Statistics(None, ""), tmp_path, seed=0)
    assert data_sources.calibration is not None
    rows = data.windows_for(data_sources.calibration, folder)
    with torch.no_grad():
        expected_outputs = original.answer(rows)
        for index in (0, len(sensitivity.parts) - 1):
            mixed, compressed = loading.load(folder), step.compress(loading.load(folder), context)
            compressed = unpacked(compressed)
            mixed.blocks[index] = compressed.blocks[index]
            model_divergence = divergence(expected_outputs, mixed.answer(rows), original.task)
            assert sensitivity.parts[index] == pytest.approx(model_divergence, rel=0.05)
            assert model_divergence > 0
    assert sensitivity.rest > 0
    assert len(sensitivity.parts) == len(original.blocks)


def test_sensitivity_is_measured_once_and_falls_as_bits_rise(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_sources = materials(tiny_llama, text_file)
    recipes = [recipe_of(Gptq(bits=bits)) for bits in (2, 8)]
    at_2_bits, at_8_bits = measure_layer_sensitivity(recipes, data_sources, tmp_path, ignore_progress)
    assert sum(at_8_bits.parts) < sum(at_2_bits.parts)
    assert at_2_bits.rest == 0.0
    monkeypatch.setattr(
        "jobs.prediction.layer_sensitivity._Original", lambda *_: pytest.fail("measured again")
    )
    assert measure_layer_sensitivity(recipes, data_sources, tmp_path, ignore_progress) == [
        at_2_bits,
        at_8_bits,
    ]


def test_blocks_that_are_equal_across_recipes_are_compared_once(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    from_block = _Batch.from_block
    monkeypatch.setattr(_Batch, "from_block", lambda *args: compared.append(1) or from_block(*args))
    recipes = [recipe_of(Rtn(bits=4, embedding_bits=bits)) for bits in (16, 8, 4)]
    sensitivities = measure_layer_sensitivity(
        recipes, materials(tiny_llama, text_file), tmp_path, ignore_progress
    )
    assert len(compared) == 4 * 8  # blocks, windows
    assert len({sensitivity.parts for sensitivity in sensitivities}) == 1
    assert sensitivities[0].rest == 0 < sensitivities[1].rest < sensitivities[2].rest


def test_sensitivity_without_a_text_or_with_removed_blocks_is_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    data_sources = materials(tiny_llama, text_file)
    with pytest.raises(ValueError, match="a calibration text"):
        measure_layer_sensitivity(
            [recipe_of(Rtn())], Materials(str(tiny_llama), "causal-lm"), tmp_path, ignore_progress
        )
    with pytest.raises(ValueError, match="leaves 3 of 4 blocks"):
        measure_layer_sensitivity([recipe_of(DropLayers(count=1))], data_sources, tmp_path, ignore_progress)


def test_the_sensitivities_of_linears_add_up_to_that_of_their_block(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    data_sources, recipes = materials(tiny_llama, text_file), [recipe_of(Rtn(bits=2))]
    by_block = measure_layer_sensitivity(recipes, data_sources, tmp_path, ignore_progress)[0]
    by_linear = measure_layer_sensitivity(recipes, data_sources, tmp_path, ignore_progress, by_linear=True)[0]
    assert len(by_linear.parts) == 7 * len(by_block.parts)
    for block, block_divergence in enumerate(by_block.parts):
        assert sum(by_linear.parts[7 * block : 7 * block + 7]) == pytest.approx(block_divergence, rel=0.5)
