"""Two exports are compared on the same items and timed in turns, whatever form each is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.executors.inline import InlineExecutor
from jobs import formats
from orchestrator.cli.app import app
from orchestrator.persistence.study_folder import MEASUREMENT
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing import compare as module
from orchestrator.publishing.compare import compare
from orchestrator.publishing.export import export_member
from orchestrator.service.launch import launch


@pytest.fixture
def exports(prepared: Callable[..., PreparedStudy], tmp_path: Path) -> tuple[Path, Path]:
    """The smallest member of a study, in two forms."""
    ready = prepared("search.candidates=2")
    launch(ready, lambda status: None, executor=InlineExecutor())
    export_member(ready.folder.path, "smallest", tmp_path / "ours", "slimfront")
    export_member(ready.folder.path, "smallest", tmp_path / "theirs", "openvino")
    return tmp_path / "ours", tmp_path / "theirs"


def test_one_model_in_two_forms_is_as_good_and_of_other_size(exports: tuple[Path, Path]) -> None:
    found = {one.metric: one for one in compare(*exports, pairs=1)}
    assert {"size_bytes", "accuracy", "perplexity", "prefill_ms", "decode_ms"} <= found.keys()
    size = found["size_bytes"]
    assert size.second == formats.size_of(exports[1], "openvino")
    assert size.against == size.second - size.first == size.low == size.high
    assert found["perplexity"].second == pytest.approx(found["perplexity"].first, rel=0.01)
    apart = found["perplexity"]
    assert 0 < apart.high - apart.low < 0.1 * apart.first, "item by item, one model is nearly the same twice"
    times = found["decode_ms"]
    assert times.against == pytest.approx(times.second / times.first)


def test_the_command_shows_both(exports: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_times", lambda *_: [])  # timed above
    done = CliRunner().invoke(app, ["compare", *map(str, exports), "--json"])
    assert done.exit_code == 0
    assert {one["metric"] for one in json.loads(done.stdout)} >= {"size_bytes", "accuracy"}


def signed_again(export: Path) -> None:
    mark = json.loads((export / formats.EXPORT_MANIFEST).read_text())
    (export / formats.EXPORT_MANIFEST).write_text(
        json.dumps({**mark, "checksums": formats.checksums(export)})
    )


def test_exports_with_other_tokenizers_have_no_items_in_common(exports: tuple[Path, Path]) -> None:
    with (exports[1] / "tokenizer.json").open("a") as file:
        file.write("\n")
    signed_again(exports[1])
    with pytest.raises(ValueError, match="different tokenizers"):
        compare(*exports, pairs=1)


def test_exports_for_different_tasks_are_not_compared(exports: tuple[Path, Path]) -> None:
    record = json.loads((exports[1] / MEASUREMENT).read_text())
    record["materials"]["task"] = "embedding"
    (exports[1] / MEASUREMENT).write_text(json.dumps(record))
    signed_again(exports[1])
    with pytest.raises(ValueError, match=r"is for causal-lm, .* for embedding: they cannot be compared"):
        compare(*exports, pairs=1)
