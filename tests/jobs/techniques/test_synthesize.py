"""Synthesis: what the original writes is its own, is sifted, taught once for all students, and told of afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.model import Model
from jobs.techniques.drop_layers import keep_blocks
from jobs.techniques.synthesize import Synthesize
from jobs.training import synthesis
from jobs.training.synthesis import GeneratedRows, Sampling


def silent(share: float, what: str) -> None:
    del share, what


@pytest.fixture
def sure(tiny_llama: Path, tmp_path: Path) -> Path:
    """A teacher with something to say: a random one finds all tokens alike."""
    model = loading.load(tiny_llama)
    model.module.get_submodule("model.norm").weight.mul_(8)
    loading.save(model, tmp_path / "sure", {})
    return tmp_path / "sure"


def context(original: Path, place: Path, seed: int = 0) -> Context:
    return Context(
        statistics=cast(Statistics, None),
        workdir=original,
        seed=seed,
        teacher=lambda: loading.load(original),
        teacher_statistics=Statistics(place / "cache", f"original{seed}"),
    )


def damaged(folder: Path) -> Model:
    model = loading.load(folder)
    keep_blocks(model, [0, 2, 3])
    return model


def test_what_is_written_follows_the_writers_own_predictions(sure: Path) -> None:
    model = loading.load(sure)
    written = synthesis.generate_rows(model, Sampling(20, 24, 0.1, 1.0), 0, silent)
    with torch.no_grad():
        logs = model.answer(written.rows)[:, :-1].float().log_softmax(-1)
    expected = -logs.gather(2, written.rows[:, 1:, None]).squeeze(2).mean(1)
    torch.testing.assert_close(written.log_perplexity, expected, rtol=0.05, atol=0.05)
    # So cold, it nearly always writes what it finds most likely.
    assert (logs.argmax(-1) == written.rows[:, 1:]).float().mean() > 0.9
    assert written.rows[:, 0].unique().numel() > 10
    hot = synthesis.generate_rows(model, Sampling(20, 24, 2.0, 1.0), 0, silent)
    assert hot.log_perplexity.mean() > written.log_perplexity.mean() + 0.5


def test_the_seed_decides_what_is_written(sure: Path) -> None:
    def rows(seed: int) -> Tensor:
        return synthesis.generate_rows(loading.load(sure), Sampling(3, 16, 1.0, 0.9), seed, silent).rows

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


def test_the_tail_beyond_top_p_is_never_drawn() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]])
    assert torch.equal(synthesis.nucleus(shares, 1.0), shares)
    # By hand: 0.5 is short of 0.7, 0.5 + 0.25 reaches it.
    expected = torch.tensor([[0.0, 0.5, 0.25, 0.0], [0.97, 0.0, 0.0, 0.0]])
    assert torch.equal(synthesis.nucleus(shares, 0.7), expected)


def test_rows_that_repeat_others_or_themselves_are_dropped() -> None:
    fresh = torch.arange(5 * 32).view(5, 32)
    loop = torch.arange(1000, 1004).repeat(8)
    near = torch.cat([fresh[1, :28], torch.arange(2000, 2004)])
    half = torch.cat([fresh[2, :12], torch.arange(3000, 3020)])
    rows = torch.cat([fresh, torch.stack([loop, near, half, fresh[0]])])
    chosen = synthesis.choose(GeneratedRows(rows, torch.arange(9.0)), keep=1.0)
    assert torch.equal(chosen.rows, torch.cat([fresh, half[None]]))
    assert (chosen.repeated, chosen.too_likely, chosen.too_unlikely) == (3, 0, 0)


def test_both_tails_of_perplexity_are_dropped_and_one_row_always_stays() -> None:
    rows = torch.arange(10 * 16).view(10, 16)
    surprise = torch.tensor([5.0, 0, 9, 1, 8, 2, 7, 3, 6, 4])
    chosen = synthesis.choose(GeneratedRows(rows, surprise), keep=0.6)
    assert torch.equal(chosen.rows, rows[(surprise >= 2) & (surprise <= 7)])
    assert (chosen.repeated, chosen.too_likely, chosen.too_unlikely) == (0, 2, 2)
    assert len(synthesis.choose(GeneratedRows(rows[:1], surprise[:1]), keep=0.05).rows) == 1


def test_nothing_but_repetition_is_refused_with_the_cure() -> None:
    rows = torch.ones(3, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match="sampling_temperature"):
        synthesis.choose(GeneratedRows(rows, torch.zeros(3)), keep=1.0)


def test_a_damaged_model_comes_nearer_to_the_original_without_any_text(sure: Path, tmp_path: Path) -> None:
    rows = synthesis.generate_rows(loading.load(sure), Sampling(16, 32, 1.0, 1.0), 9, silent).rows

    def apart(model: Model) -> float:
        with torch.no_grad():
            said, taught = (one.answer(rows).float().log_softmax(-1) for one in (model, loading.load(sure)))
        return nn.functional.kl_div(said, taught, log_target=True, reduction="batchmean").item()

    model = damaged(sure)
    before, layout = apart(model), model.layout()
    given = context(sure, tmp_path)
    step = Synthesize(
        samples=128, tokens=32, steps=60, batch=8, learning_rate=3e-3, hard_weight=0.0, keep=0.75
    )
    step.compress(model, given)
    assert apart(model) < 0.8 * before
    assert model.layout() == layout
    told = given.notes["written"]
    assert told["teacher"] == loading.digest(sure)
    assert (told["seed"], told["samples"], told["temperature"]) == (0, 128, 1.0)
    dropped = ("dropped_as_repeated", "dropped_as_too_likely", "dropped_as_too_unlikely")
    assert told["kept"] == 128 - sum(told[name] for name in dropped) == 96
    json.dumps(given.notes)


def test_it_is_written_once_for_all_students(sure: Path, tmp_path: Path) -> None:
    shared, made = context(sure, tmp_path), []
    for share in (0.5, 1.0):
        step = Synthesize(samples=4, tokens=16, steps=1, keep=share)
        step.compress(damaged(sure), dataclasses.replace(shared, notes={}))
        (file,) = (tmp_path / "cache").glob("*.0.safetensors")
        made.append(file.stat().st_ino)
    assert made[0] == made[1]


def test_only_models_that_predict_next_tokens_can_write() -> None:
    assert Synthesize.refusal(families.family("bert"), "embedding")
    assert Synthesize.refusal(families.family("llama"), "classification")
    assert Synthesize.refusal(families.family("llama"), "causal-lm") is None


def test_more_tokens_than_the_teacher_reads_are_refused(sure: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"synthesize\.tokens=257 is outside \[16, 256\]"):
        Synthesize(samples=1, tokens=257, steps=1).compress(damaged(sure), context(sure, tmp_path))
