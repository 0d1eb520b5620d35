"""The number of ranks, the ZeRO stage and the micro-batch follow from the model's size and the device memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import parallel
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.parallel import WORKER_GIB, Sharing, ranks_for, row_bytes, rows_at_once, training_gib
from jobs.techniques.finetune import Finetune
from jobs.training import loop, settings
from jobs.training.ranks import Ranks

BILLION = 10**9


def test_the_bytes_per_weight_equal_those_of_the_paper() -> None:
    """Figure 1 states 120, 31.4, 16.6 and 1.9 GB for 7.5 billion weights on 64 ranks."""
    model = [parallel.bytes_per_weight(stage, 64) - 4 for stage in range(4)]
    assert [round(7.5 * weight_bytes, 1) for weight_bytes in model] == [120.0, 31.4, 16.6, 1.9]
    # One rank needs 20 bytes per weight: weights, gradients, master weights, two moments and a teacher.
    assert training_gib(2**30, 0, 1) == pytest.approx(WORKER_GIB + 20)


def test_the_fewest_ranks_and_the_lowest_stage_that_fit_are_chosen() -> None:
    assert ranks_for(BILLION, 24.0, max_ranks=8) == 1
    needed = ranks_for(10 * BILLION, 80.0, max_ranks=8)
    assert needed == 4
    assert training_gib(10 * BILLION, 3, needed) <= 80 < training_gib(10 * BILLION, 3, needed - 1)
    assert (
        ranks_for(10 * BILLION, 80.0, max_ranks=3) == 3
    )  # all available ranks are used even if the training may not fit
    assert ranks_for(10 * BILLION, 80.0, max_ranks=8, highest=2) > needed
    stages = [Sharing().stage(BILLION, 4, device_gib) for device_gib in (20.0, 11.0, 9.5, 9.0, 1.0)]
    assert stages == [0, 1, 2, 3, 3]
    assert Sharing().stage(BILLION, 1, 1.0) == 0  # a single rank has nothing to partition
    assert Sharing().stage(BILLION, 4, 1.0, highest=2) == 2
    assert Sharing(zero_stage=1).stage(BILLION, 4, 1000.0) == 1


def test_micro_batches_fit_the_memory_and_divide_the_rows_of_each_rank() -> None:
    def rows(
        batch: int, ranks: int, fit: float = 100, requested: int | None = None, kind: str = "cuda"
    ) -> int:
        return rows_at_once(batch, ranks, 128, kind, 1.0, 2 * fit, requested)

    assert rows(8, 1) == 8
    assert rows(8, 1, kind="cpu") == 4  # 512 tokens
    assert rows(8, 1, fit=3) == 2
    assert rows(8, 1, fit=0) == rows(8, 1, fit=-5) == 1
    assert rows(8, 1, fit=0, requested=8) == 8
    assert rows(8, 2) == 4
    assert rows(12, 2, fit=5) == 3  # two micro-batches per rank; with 4 rows one rank would wait
    assert rows(5, 2) == rows(1, 4) == 1
    assert rows(8, 2, requested=3) == 2


def test_activations_of_a_gpt_block_are_close_to_those_of_the_paper() -> None:
    """Korthikanti et al. 2022, eq. 2: the part linear in the tokens takes 34 bytes per token and unit of width."""
    width, tokens = 64, 10
    widths = (width + 3 * width) + 2 * width + 2 * (width + 4 * width)
    assert row_bytes(tokens, widths, 0) == pytest.approx(34 * tokens * width, rel=0.06)


def test_each_rank_has_separate_batches_and_an_incomplete_round_is_shared() -> None:
    shards = [list(Ranks(rank, 2).shard("abc")) for rank in range(2)]
    assert shards == [[("a", 2), ("c", 1)], [("b", 2), ("c", 1)]]
    assert list(Ranks().shard("ab")) == [("a", 1), ("b", 1)]


def test_a_training_uses_the_stage_and_the_micro_batch_of_the_study(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []

    def record(
        module: Any, batches: Any, loss_of: Any, training: settings.Training, *_: Any, **__: Any
    ) -> None:
        calls.append((training.zero_stage, training.accumulate, len(next(iter(batches)))))

    monkeypatch.setattr(loop, "train", record)
    for sharing in (Sharing(), Sharing(zero_stage=2, micro_batch=3)):
        rows = torch.randint(3, 512, (8, 16))
        context = Context(Statistics(None, "key"), tmp_path, 0, training=rows, sharing=sharing)
        Finetune(steps=1, batch=6, method="full").compress(loading.load(tiny_llama), context)
    assert calls == [(0, 1, 6), (2, 2, 3)]
