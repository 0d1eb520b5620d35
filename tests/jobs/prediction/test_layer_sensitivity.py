"""What a step does to one block alone is told as if the whole model had been run with that block."""

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


def quiet(share: float, what: str) -> None:
    pass


def test_the_divergence_of_equal_logits_is_nought_and_of_others_that_of_kullback_and_leibler() -> None:
    meant, said = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    assert divergence(meant, meant, "causal-lm") == 0.0
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(meant, said, "causal-lm") == pytest.approx(by_hand, rel=1e-6)
    assert divergence(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "classification") == 4.0
    assert divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), "embedding") == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3_text", "distilbert"])
def test_a_block_by_itself_does_what_it_does_in_the_whole_model(
    family: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = tiny(family)
    given, step = materials(folder, text_file), Rtn(bits=2, embedding_bits=4)
    found = measure_layer_sensitivity([recipe_of(step)], given, tmp_path, quiet)[0]
    original, context = loading.load(folder), Context(Statistics(None, ""), tmp_path, seed=0)
    assert given.calibration is not None
    rows = data.windows_for(given.calibration, folder)
    with torch.no_grad():
        meant = original.answer(rows)
        for index in (0, len(found.parts) - 1):
            mixed, changed = loading.load(folder), step.compress(loading.load(folder), context)
            changed = unpacked(changed)
            mixed.blocks[index] = changed.blocks[index]
            whole = divergence(meant, mixed.answer(rows), original.task)
            assert found.parts[index] == pytest.approx(whole, rel=0.05)
            assert whole > 0
    assert found.rest > 0
    assert len(found.parts) == len(original.blocks)


def test_it_is_measured_once_and_falls_as_bits_rise(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = materials(tiny_llama, text_file)
    recipes = [recipe_of(Gptq(bits=bits)) for bits in (2, 8)]
    two, eight = measure_layer_sensitivity(recipes, given, tmp_path, quiet)
    assert sum(eight.parts) < sum(two.parts)
    assert two.rest == 0.0
    monkeypatch.setattr(
        "jobs.prediction.layer_sensitivity._Original", lambda *_: pytest.fail("measured again")
    )
    assert measure_layer_sensitivity(recipes, given, tmp_path, quiet) == [two, eight]


def test_blocks_that_settings_leave_alike_are_compared_once(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    once = _Batch.from_block
    monkeypatch.setattr(_Batch, "from_block", lambda *given: compared.append(1) or once(*given))
    recipes = [recipe_of(Rtn(bits=4, embedding_bits=bits)) for bits in (16, 8, 4)]
    found = measure_layer_sensitivity(recipes, materials(tiny_llama, text_file), tmp_path, quiet)
    assert len(compared) == 4 * 8  # blocks, windows
    assert len({one.parts for one in found}) == 1
    assert found[0].rest == 0 < found[1].rest < found[2].rest


def test_without_a_text_or_where_blocks_vanish_it_is_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    given = materials(tiny_llama, text_file)
    with pytest.raises(ValueError, match="a calibration text"):
        measure_layer_sensitivity(
            [recipe_of(Rtn())], Materials(str(tiny_llama), "causal-lm"), tmp_path, quiet
        )
    with pytest.raises(ValueError, match="leaves 3 of 4 blocks"):
        measure_layer_sensitivity([recipe_of(DropLayers(count=1))], given, tmp_path, quiet)


def test_linears_are_told_apart_and_together_do_what_their_block_does(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    given, recipes = materials(tiny_llama, text_file), [recipe_of(Rtn(bits=2))]
    whole = measure_layer_sensitivity(recipes, given, tmp_path, quiet)[0]
    apart = measure_layer_sensitivity(recipes, given, tmp_path, quiet, by_linear=True)[0]
    assert len(apart.parts) == 7 * len(whole.parts)
    for block, together in enumerate(whole.parts):
        assert sum(apart.parts[7 * block : 7 * block + 7]) == pytest.approx(together, rel=0.5)
