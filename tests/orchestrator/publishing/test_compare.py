"""Two exports of any formats are compared on the same items and timed alternately."""

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
    """Return two exports of the smallest member of a study, in different formats."""
    ready = prepared("search.candidates=2")
    launch(ready, lambda status: None, executor=InlineExecutor())
    export_member(ready.folder.path, "smallest", tmp_path / "ours", "slimfront")
    export_member(ready.folder.path, "smallest", tmp_path / "theirs", "openvino")
    return tmp_path / "ours", tmp_path / "theirs"


def test_one_model_in_two_formats_is_equally_good_and_differs_in_size(exports: tuple[Path, Path]) -> None:
    comparisons = {comparison.metric: comparison for comparison in compare(*exports, pairs=1)}
    assert {"size_bytes", "accuracy", "perplexity", "prefill_ms", "decode_ms"} <= comparisons.keys()
    size = comparisons["size_bytes"]
    assert size.second == formats.size_of(exports[1], "openvino")
    assert size.against == size.second - size.first == size.low == size.high
    assert comparisons["perplexity"].second == pytest.approx(comparisons["perplexity"].first, rel=0.01)
    perplexity = comparisons["perplexity"]
    assert 0 < perplexity.high - perplexity.low < 0.1 * perplexity.first, (
        "item by item, both exports of one model are nearly equal"
    )
    latency = comparisons["decode_ms"]
    assert latency.against == pytest.approx(latency.second / latency.first)


def test_the_command_shows_both_exports(exports: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_times", lambda *_: [])  # timed above
    result = CliRunner().invoke(app, ["compare", *map(str, exports), "--json"])
    assert result.exit_code == 0
    assert {comparison["metric"] for comparison in json.loads(result.stdout)} >= {"size_bytes", "accuracy"}


def update_checksums(export: Path) -> None:
    manifest = json.loads((export / formats.EXPORT_MANIFEST).read_text())
    (export / formats.EXPORT_MANIFEST).write_text(
        json.dumps({**manifest, "checksums": formats.checksums(export)})
    )


def test_exports_with_different_tokenizers_are_not_compared(exports: tuple[Path, Path]) -> None:
    with (exports[1] / "tokenizer.json").open("a") as file:
        file.write("\n")
    update_checksums(exports[1])
    with pytest.raises(ValueError, match="different tokenizers"):
        compare(*exports, pairs=1)


def test_exports_for_different_tasks_are_not_compared(exports: tuple[Path, Path]) -> None:
    record = json.loads((exports[1] / MEASUREMENT).read_text())
    record["materials"]["task"] = "embedding"
    (exports[1] / MEASUREMENT).write_text(json.dumps(record))
    update_checksums(exports[1])
    with pytest.raises(ValueError, match=r"is for causal-lm, .* for embedding: they cannot be compared"):
        compare(*exports, pairs=1)
