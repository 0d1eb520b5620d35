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
from jobs.progress import Report
from tests.conftest import Tiny

SILENT: Report = lambda share, what: None  # noqa: E731


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_stream, "TOKENS_AT_ONCE", 2 * 20)


def tokens(rows: int = 5) -> Tensor:
    """Of 20 tokens: batches of 2, 2 and 1."""
    return torch.randint(3, 512, (rows, 20), generator=torch.Generator().manual_seed(0))


def entering(model: Model, rows: Tensor) -> list[list[Tensor]]:
    """What enters each block in whole passes, block by block, batch by batch."""
    seen: list[list[Tensor]] = [[] for _ in model.blocks]
    hooks = [
        block.register_forward_pre_hook(lambda module, args, index=index: seen[index].append(args[0].clone()))
        for index, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        for start in range(0, len(rows), 2):
            model.module(rows[start : start + 2])
    for hook in hooks:
        hook.remove()
    return seen


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in families.names() for task in families.family(name).tasks]
)
def test_each_block_is_given_what_it_is_in_a_whole_pass(name: str, task: families.Task, tiny: Tiny) -> None:
    model = loading.load(tiny(name, task))
    found = [list(visit.inputs()) for visit in stream(model, tokens(), SILENT, "test")]
    expected = entering(model, tokens())
    assert len(found) == len(expected) == len(model.blocks)
    assert all(map(same, found, expected))


@pytest.mark.parametrize(("name", "key"), [("gpt_neo", "window_size"), ("gemma3_text", "sliding_window")])
def test_blocks_that_attend_to_few_tokens_stay_so_beside_those_that_attend_to_all(
    name: str, key: str, tiny: Tiny, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(tiny(name), narrow)
    config = json.loads((narrow / "config.json").read_text())
    assert config[key] > 20
    (narrow / "config.json").write_text(json.dumps({**config, key: 4}))
    model = loading.load(narrow)
    found = [list(visit.inputs()) for visit in stream(model, tokens(), SILENT, "test")]
    assert all(map(same, found, entering(model, tokens())))
    wide = entering(loading.load(tiny(name)), tokens())
    assert [same(one, other) for one, other in zip(found, wide, strict=True)].count(False) > 0


def linears_of(visit: Visit) -> list[nn.Linear]:
    return [part for part in visit.block.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("name", families.names())
def test_later_blocks_see_what_changed_ones_give(name: str, tiny: Tiny) -> None:
    model = loading.load(tiny(name))
    found = []
    for visit in stream(model, tokens(), SILENT, "test"):
        found.append(list(visit.inputs()))
        visit.run()
        for layer in linears_of(visit):
            layer.weight.data *= 0.5
    assert all(map(same, found, entering(model, tokens())))
    original = loading.load(tiny(name))
    assert same(found[0], entering(original, tokens())[0])
    assert not same(found[1], entering(original, tokens())[1])


def test_hooks_see_every_row_once_a_run(tiny_llama: Path) -> None:
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


def test_a_visit_that_has_ended_cannot_be_used_again(tiny_llama: Path) -> None:
    visits = stream(loading.load(tiny_llama), tokens(), SILENT, "test")
    visit = next(visits)
    visit.leave()
    for again in (visit.run, visit.leave, lambda: next(visit.inputs())):
        with pytest.raises(RuntimeError, match=r"the visit of model\.layers\.0 has ended"):
            again()
    second = next(visits)
    next(visits)
    with pytest.raises(RuntimeError, match=r"the visit of model\.layers\.1 has ended"):
        second.run()


def test_nothing_is_left_on_the_model(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    with torch.no_grad():
        before = model.module(tokens()).logits
    shares: list[float] = []

    def report(share: float, what: str) -> None:
        shares.append(share)

    for _ in stream(model, tokens(), report, "test"):
        pass
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.module.modules())
    with torch.no_grad():
        assert torch.equal(model.module(tokens()).logits, before)
    assert shares == sorted(shares)
    assert 0 <= min(shares) <= max(shares) < 1
