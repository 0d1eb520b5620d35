"""Synthesis: the original generates rows once for all students, drops unsuitable rows, and records how many."""

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


def ignore_progress(share: float, activity: str) -> None:
    del share, activity


@pytest.fixture
def confident_teacher(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return a teacher with clear predictions; those of a random model are nearly uniform."""
    model = loading.load(tiny_llama)
    model.module.get_submodule("model.norm").weight.mul_(8)
    loading.save(model, tmp_path / "sure", {})
    return tmp_path / "sure"


def context(original: Path, folder: Path, seed: int = 0) -> Context:
    return Context(
        statistics=cast(Statistics, None),
        workdir=original,
        seed=seed,
        teacher=lambda: loading.load(original),
        teacher_statistics=Statistics(folder / "cache", f"original{seed}"),
    )


def load_damaged(folder: Path) -> Model:
    model = loading.load(folder)
    keep_blocks(model, [0, 2, 3])
    return model


def test_generated_rows_follow_the_teachers_predictions(confident_teacher: Path) -> None:
    model = loading.load(confident_teacher)
    generated = synthesis.generate_rows(model, Sampling(20, 24, 0.1, 1.0), 0, ignore_progress)
    with torch.no_grad():
        logs = model.answer(generated.rows)[:, :-1].float().log_softmax(-1)
    expected = -logs.gather(2, generated.rows[:, 1:, None]).squeeze(2).mean(1)
    torch.testing.assert_close(generated.log_perplexity, expected, rtol=0.05, atol=0.05)
    # At this low temperature it nearly always generates the most likely token.
    assert (logs.argmax(-1) == generated.rows[:, 1:]).float().mean() > 0.9
    assert generated.rows[:, 0].unique().numel() > 10
    hot = synthesis.generate_rows(model, Sampling(20, 24, 2.0, 1.0), 0, ignore_progress)
    assert hot.log_perplexity.mean() > generated.log_perplexity.mean() + 0.5


def test_the_seed_determines_the_generated_rows(confident_teacher: Path) -> None:
    def generate(seed: int) -> Tensor:
        return synthesis.generate_rows(
            loading.load(confident_teacher), Sampling(3, 16, 1.0, 0.9), seed, ignore_progress
        ).rows

    assert torch.equal(generate(0), generate(0))
    assert not torch.equal(generate(0), generate(1))


def test_the_tail_beyond_top_p_is_never_drawn() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]])
    assert torch.equal(synthesis.nucleus(shares, 1.0), shares)
    # By hand: 0.5 is below 0.7, 0.5 + 0.25 reaches it.
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


def test_only_repeated_rows_are_refused_with_a_suggestion() -> None:
    rows = torch.ones(3, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match="sampling_temperature"):
        synthesis.choose(GeneratedRows(rows, torch.zeros(3)), keep=1.0)


def test_a_damaged_model_comes_closer_to_the_original_without_any_text(
    confident_teacher: Path, tmp_path: Path
) -> None:
    rows = synthesis.generate_rows(
        loading.load(confident_teacher), Sampling(16, 32, 1.0, 1.0), 9, ignore_progress
    ).rows

    def divergence(model: Model) -> float:
        with torch.no_grad():
            student = model.answer(rows).float().log_softmax(-1)
            teacher = loading.load(confident_teacher).answer(rows).float().log_softmax(-1)
        return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").item()

    model = load_damaged(confident_teacher)
    initial_divergence, layout = divergence(model), model.layout()
    noted_context = context(confident_teacher, tmp_path)
    step = Synthesize(
        samples=128, tokens=32, steps=60, batch=8, learning_rate=3e-3, hard_weight=0.0, keep=0.75
    )
    step.compress(model, noted_context)
    assert divergence(model) < 0.8 * initial_divergence
    assert model.layout() == layout
    note = noted_context.notes["written"]
    assert note["teacher"] == loading.digest(confident_teacher)
    assert (note["seed"], note["samples"], note["temperature"]) == (0, 128, 1.0)
    dropped = ("dropped_as_repeated", "dropped_as_too_likely", "dropped_as_too_unlikely")
    assert note["kept"] == 128 - sum(note[name] for name in dropped) == 96
    json.dumps(noted_context.notes)


def test_rows_are_generated_once_for_all_students(confident_teacher: Path, tmp_path: Path) -> None:
    shared, file_ids = context(confident_teacher, tmp_path), []
    for share in (0.5, 1.0):
        step = Synthesize(samples=4, tokens=16, steps=1, keep=share)
        step.compress(load_damaged(confident_teacher), dataclasses.replace(shared, notes={}))
        (file,) = (tmp_path / "cache").glob("*.0.safetensors")
        file_ids.append(file.stat().st_ino)
    assert file_ids[0] == file_ids[1]


def test_only_causal_models_can_generate() -> None:
    assert Synthesize.refusal(families.family("bert"), "embedding")
    assert Synthesize.refusal(families.family("llama"), "classification")
    assert Synthesize.refusal(families.family("llama"), "causal-lm") is None


def test_more_tokens_than_the_teachers_context_are_refused(confident_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"synthesize\.tokens=257 is outside \[16, 256\]"):
        Synthesize(samples=1, tokens=257, steps=1).compress(
            load_damaged(confident_teacher), context(confident_teacher, tmp_path)
        )
