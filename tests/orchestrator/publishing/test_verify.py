"""Verification measures an export again: recorded metrics must be reproduced and damaged files are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.executors.inline import InlineExecutor
from jobs import formats
from jobs.measurement.measurement import Measurement
from orchestrator.persistence.study_folder import MEASUREMENT, RECIPE
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing.export import export_member
from orchestrator.publishing.verify import compare, verify
from orchestrator.service.launch import launch


@pytest.fixture
def exported(prepared: Callable[..., PreparedStudy], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs a small study for a runtime and exports its smallest member."""

    def export(runtime: str) -> Path:
        ready = prepared("search.candidates=2", f"target.runtime={runtime}")
        launch(ready, lambda status: None, executor=InlineExecutor())
        export_member(ready.folder.path, "smallest", tmp_path / "out")
        return tmp_path / "out"

    return export


@pytest.mark.parametrize(("runtime", "format"), [("torch", "slimfront"), ("openvino", "openvino")])
def test_recorded_metrics_are_reproduced(exported: Callable[..., Path], runtime: str, format: str) -> None:
    out = exported(runtime)
    assert formats.format_of(out) == format
    checks = {check.metric: check for check in verify(out)}
    assert {"size_bytes", "accuracy", "perplexity"} <= set(checks)
    assert checks["size_bytes"].measured == formats.size_of(out, format)
    assert all(check.ok and check.allowed is not None for check in checks.values())
    card = (out / "README.md").read_text()
    assert "size_bytes" in card
    recipe = json.loads((out / RECIPE).read_text())
    assert recipe["text"] in card
    assert "Evaluated on" in card
    assert ("Calibrated on" in card) is any(step["technique"] != "rtn" for step in recipe["steps"])
    assert "Trained on" not in card


def test_metrics_that_are_not_reproduced_are_reported(exported: Callable[..., Path]) -> None:
    out = exported("torch")
    record = json.loads((out / MEASUREMENT).read_text())
    record["metrics"]["perplexity"] *= 2
    record["metrics"]["size_bytes"] -= 1
    (out / MEASUREMENT).write_text(json.dumps(record))
    manifest = json.loads((out / formats.EXPORT_MANIFEST).read_text())
    manifest["checksums"] = formats.checksums(out)
    (out / formats.EXPORT_MANIFEST).write_text(json.dumps(manifest))
    assert {check.metric for check in verify(out) if not check.ok} == {"perplexity", "size_bytes"}


def test_a_damaged_or_missing_file_is_refused_by_name(exported: Callable[..., Path]) -> None:
    out = exported("torch")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"checksum of .*model\.safetensors is wrong"):
        verify(out)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        verify(out)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not an export of slimfront"):
        verify(tmp_path)


def record(**changes: Any) -> dict[str, Any]:
    return {
        "metrics": {"decode_ms": 10.0, "decode_p90_ms": 11.0, "accuracy": 0.5, "size_bytes": 100.0},
        "errors": {"decode_ms": 0.3, "accuracy": 0.01},
        "environment": {"cpu": "one"},
        **changes,
    }


def measured(environment: dict[str, str], unreliable: tuple[str, ...] = (), **metrics: float) -> Measurement:
    values = {"decode_ms": 10.0, "decode_p90_ms": 15.0, "accuracy": 0.5, "size_bytes": 100.0, **metrics}
    return Measurement(values, {"decode_ms": 0.4, "accuracy": 0.01}, unreliable, environment)


def test_differences_up_to_three_combined_errors_are_allowed() -> None:
    # 3 · √(0.3² + 0.4²) = 1.5
    for decode_ms, ok in ((11.4, True), (11.6, False), (8.6, True), (8.4, False)):
        checks = {
            check.metric: check for check in compare(record(), measured({"cpu": "one"}, decode_ms=decode_ms))
        }
        assert checks["decode_ms"].ok is ok
        assert checks["decode_ms"].allowed == pytest.approx(1.5)


def test_metrics_without_an_error_are_only_shown_but_the_size_must_be_equal() -> None:
    checks = {check.metric: check for check in compare(record(), measured({"cpu": "one"}, size_bytes=101.0))}
    assert checks["decode_p90_ms"].allowed is None
    assert checks["decode_p90_ms"].ok
    assert not checks["size_bytes"].ok


def test_timings_of_another_or_a_noisy_machine_are_not_compared() -> None:
    other_machine = {
        check.metric: check for check in compare(record(), measured({"cpu": "two"}, decode_ms=99.0))
    }
    assert other_machine["decode_ms"].ok
    assert "cpu" in other_machine["decode_ms"].note
    noisy = compare(record(), measured({"cpu": "one"}, ("decode_ms",), decode_ms=99.0))
    assert next(check for check in noisy if check.metric == "decode_ms").ok
