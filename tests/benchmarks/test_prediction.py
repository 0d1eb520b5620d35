"""The models that the benchmark of predictions leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prediction import predictable
from benchmarks.shapes import outlined, steps_of
from jobs.models import loading
from jobs.prediction.latency_model import Sample, amounts, fit


def test_a_model_with_an_operation_that_was_not_timed_is_left_out(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = loading.original_layout(tiny_llama)
    pruned = outlined(original, steps_of("prune_ffn ratio=0.5"))
    packed = outlined(original, steps_of("rtn bits=8 group=64"))
    table = fit([Sample(amounts(original), {"decode_ms": 2.0}), Sample(amounts(pruned), {"decode_ms": 1.5})])
    assert predictable([("pruned", pruned), ("packed", packed)], table) == {"pruned": pruned}
    assert "packed 8 group 64: packed" in capsys.readouterr().out
