"""A stand-in has all shapes of its layout, and runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import techniques
from jobs.models import loading, stand_in
from jobs.models.layout import Layout
from jobs.runtimes import on_torch
from jobs.technique import Technique


def step(name: str, **options: object) -> Technique:
    return techniques.load(name).of(options)  # type: ignore[arg-type]


CASES = [
    ("llama", []),
    ("llama", [step("drop_layers", count=1)]),
    ("llama", [step("prune_ffn", ratio=0.25), step("prune_heads", ratio=0.5)]),
    ("llama", [step("prune_hidden", ratio=0.25)]),
    ("llama", [step("svd", keep=0.5), step("rtn", bits=4, group=32, symmetric=False)]),
    ("llama", [step("rtn", bits=3, group=32, embedding_bits=8)]),
    ("llama", [step("hqq", bits=2, group=32)]),
    ("llama", [step("magnitude", sparsity=0.6)]),
    ("llama", [step("smoothquant")]),
    ("gpt_neo", [step("drop_layers", count=1)]),
    ("gemma3_text", [step("drop_layers", count=2), step("prune_heads", ratio=0.5)]),
    ("bert", [step("prune_ffn", ratio=0.25), step("rtn", bits=4, group=32, embedding_bits=8)]),
]


def output_layout(steps: list[Technique], layout: Layout) -> Layout:
    for technique in steps:
        layout = technique.output_layout(layout)
    return layout


def name_case(value: str | list[Technique]) -> str:
    """Return the text by which pytest shows a family or a list of steps."""
    if isinstance(value, str):
        return value
    return " ".join(map(str, value))


@pytest.mark.parametrize(
    ("family", "steps"),
    CASES,
    ids=name_case,
)
def test_a_stand_in_has_the_requested_layout_and_runs(
    family: str, steps: list[Technique], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny(family)
    layout = output_layout(steps, loading.original_layout(original))
    stand_in.save_stand_in(layout, original, tmp_path / "model")
    assert Layout.read(tmp_path / "model") == layout
    rows = np.arange(8)[None]
    answer = on_torch.start(tmp_path / "model", 1).answer(rows)
    assert np.isfinite(answer).all()
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == layout.size_bytes()
