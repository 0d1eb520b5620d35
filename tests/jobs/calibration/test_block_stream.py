"""Streaming calibration block by block gives each block the same inputs as a forward pass of the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.calibration import block_stream
from jobs.calibration.block_stream import Visit, stream
from jobs.models import families, loading
from jobs.models.model import Model
from jobs.progress import Report, no_report
from tests.conftest import Tiny

SILENT: Report = no_report


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_stream, "TOKENS_AT_ONCE", 2 * 20)


def tokens(rows: int = 5) -> Tensor:
    """Return rows of 20 tokens, which form batches of 2, 2 and 1 rows."""
    return torch.randint(3, 512, (rows, 20), generator=torch.Generator().manual_seed(0))


def record_inputs(model: Model, rows: Tensor) -> list[list[Tensor]]:
    """Return the inputs of each block, batch by batch, in forward passes of the whole model."""
    inputs: list[list[Tensor]] = [[] for _ in model.blocks]
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, index=index: inputs[index].append(args[0].clone())
        )
        for index, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        for start in range(0, len(rows), 2):
            model.module(rows[start : start + 2])
    for hook in hooks:
        hook.remove()
    return inputs


def are_equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in families.names() for task in families.family(name).tasks]
)
def test_each_block_reads_the_same_inputs_as_in_a_whole_pass(
    name: str, task: families.Task, tiny: Tiny
) -> None:
    model = loading.load(tiny(name, task))
    inputs = [list(visit.inputs()) for visit in stream(model, tokens(), SILENT, "test")]
    expected = record_inputs(model, tokens())
    assert len(inputs) == len(expected) == len(model.blocks)
    assert all(map(are_equal, inputs, expected))


@pytest.mark.parametrize(("name", "key"), [("gpt_neo", "window_size"), ("gemma3_text", "sliding_window")])
def test_blocks_keep_their_attention_window_among_blocks_with_full_attention(
    name: str, key: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(tiny(name), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config[key] > 20
    (folder / "config.json").write_text(json.dumps({**config, key: 4}))
    model = loading.load(folder)
    inputs = [list(visit.inputs()) for visit in stream(model, tokens(), SILENT, "test")]
    assert all(map(are_equal, inputs, record_inputs(model, tokens())))
    wide = record_inputs(loading.load(tiny(name)), tokens())
    assert [
        are_equal(narrow_inputs, wide_inputs) for narrow_inputs, wide_inputs in zip(inputs, wide, strict=True)
    ].count(False) > 0


def linears_of(visit: Visit) -> list[nn.Linear]:
    return [part for part in visit.block.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("name", families.names())
def test_later_blocks_read_the_outputs_of_changed_blocks(name: str, tiny: Tiny) -> None:
    model = loading.load(tiny(name))
    inputs = []
    for visit in stream(model, tokens(), SILENT, "test"):
        inputs.append(list(visit.inputs()))
        visit.run()
        for layer in linears_of(visit):
            layer.weight.data *= 0.5
    assert all(map(are_equal, inputs, record_inputs(model, tokens())))
    original = loading.load(tiny(name))
    assert are_equal(inputs[0], record_inputs(original, tokens())[0])
    assert not are_equal(inputs[1], record_inputs(original, tokens())[1])


def test_hooks_receive_every_row_once_per_run(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    rows: list[int] = []
    for visit in stream(model, tokens(), SILENT, "test"):
        hook = linears_of(visit)[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        if visit.index == 1:
            visit.run()
        if visit.index < 2:
            visit.leave()
        hook.remove()
    assert rows == [2, 2, 1] * 3


def test_an_ended_visit_cannot_be_used_again(tiny_llama: Path) -> None:
    visits = stream(loading.load(tiny_llama), tokens(), SILENT, "test")
    visit = next(visits)
    visit.leave()
    for use_again in (visit.run, visit.leave, lambda: next(visit.inputs())):
        with pytest.raises(RuntimeError, match=r"the visit of model\.layers\.0 has ended"):
            use_again()
    second_visit = next(visits)
    next(visits)
    with pytest.raises(RuntimeError, match=r"the visit of model\.layers\.1 has ended"):
        second_visit.run()


def test_streaming_leaves_no_hooks_and_no_changes_on_the_model(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    with torch.no_grad():
        original_logits = model.module(tokens()).logits
    shares: list[float] = []

    def report(share: float, activity: str) -> None:
        shares.append(share)

    for _ in stream(model, tokens(), report, "test"):
        pass
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.module.modules())
    with torch.no_grad():
        assert torch.equal(model.module(tokens()).logits, original_logits)
    assert shares == sorted(shares)
    assert 0 <= min(shares) <= max(shares) < 1
