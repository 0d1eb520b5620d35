"""Files of commit 4683a6e must still open: its studies, stores and exports, and every name that it wrote.

tests/stored/README.md describes how the files were made. Each test copies them, since commands write next to them.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

STORED = Path(__file__).parents[1] / "stored" / "4683a6e"
EXPECTED = json.loads((STORED / "expected.json").read_text())
FORMATS = ("compressed-tensors", "gguf", "onnx", "openvino", "safetensors", "slimfront")
STUDIES = ("finished", "interrupted", "every-name")
WORK_FOLDER = "/somewhere/studies"
"""Replaces in the outbox the folder in which the studies ran; no other stored file has an absolute path."""
RENAMED = {"elsewhere": "other_environment", "outrun": "eliminated"}
"""Standings that later versions may print with another name."""
TIMES = ("_ms", "_gib", "load_share")
"""Endings of metrics that depend on the machine; other metrics must equal the recorded ones."""


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A copy of the folder that holds the studies, under a path with a space."""
    copy = Path(shutil.copytree(STORED, tmp_path / "moved here"))
    for store in copy.glob("* store"):
        (store / "tmp").mkdir(exist_ok=True)  # git stores no empty folders
    return copy


def slimfront(*arguments: object, cwd: Path, codes: tuple[int, ...] = (0,)) -> str:
    """Return the output of the command, run in the folder to which the paths of the studies are relative."""
    process = subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert process.returncode in codes, process.stderr
    return process.stdout


def with_new_standings(front: dict[str, Any]) -> dict[str, Any]:
    """Return the front with the later names of standings."""
    counts = {RENAMED.get(standing, standing): count for standing, count in front["candidates"].items()}
    return {**front, "candidates": counts}


def member_ids(folder: Path) -> list[str]:
    return [member["id"] for member in json.loads((folder / "front.json").read_text())["members"]]


def events(ledger: Path) -> Iterator[dict[str, Any]]:
    """Yield the bodies of all events of a ledger, independently of the names of their kinds."""
    with sqlite3.connect(ledger) as database:
        for (body,) in database.execute("select body from events order by number"):
            yield json.loads(body)
    database.close()


def attempts_by_job(ledger: Path) -> Counter[str]:
    """Return the number of started attempts of each job."""
    return Counter(body["job_id"] for body in events(ledger) if "attempt" in body and "outcome" not in body)


def outcomes_by_job(ledger: Path) -> dict[str, str]:
    """Return the outcome of the last attempt of each job."""
    return {body["job_id"]: body["outcome"]["outcome"] for body in events(ledger) if "outcome" in body}


@pytest.mark.parametrize("name", STUDIES)
def test_status_front_and_store_are_printed_as_the_old_commit_printed_them(studies: Path, name: str) -> None:
    folder = f"{name} store/{name}"
    status = json.loads(slimfront("status", folder, "--json", cwd=studies))
    assert EXPECTED[name]["status"].items() <= status.items()
    front = json.loads(slimfront("front", folder, "--json", cwd=studies))
    assert with_new_standings(front) == with_new_standings(EXPECTED[name]["front"])
    store = json.loads(slimfront("store", f"{name} store", "--json", cwd=studies))
    assert store == EXPECTED[name]["store"]


def test_status_front_and_report_of_a_finished_study_are_shown(studies: Path) -> None:
    assert "done" in slimfront("status", "finished store/finished", cwd=studies)
    output = slimfront("front", "finished store/finished", cwd=studies)
    assert all(id[:8] in output for id in member_ids(studies / "finished store/finished"))
    page = slimfront("report", "finished store/finished", cwd=studies).strip()
    assert (studies / page).is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_a_member_is_exported_to_the_same_weights(studies: Path, format: str) -> None:
    folder, pick = "finished store/finished", EXPECTED["exports"][format]
    slimfront("export", folder, "again", "--pick", pick, "--format", format, cwd=studies)
    old, new = studies / "exports" / format, studies / "again"
    for name in ("recipe.json", "measurement.json"):
        assert json.loads((new / name).read_text()) == json.loads((old / name).read_text())
    old_manifest, new_manifest = (json.loads((out / "export.json").read_text()) for out in (old, new))
    assert {**new_manifest, "checksums": {}} == {**old_manifest, "checksums": {}}
    assert new_manifest["checksums"].keys() == old_manifest["checksums"].keys()
    for file in sorted(old_manifest["checksums"]):
        # Graphs state the version of the library that wrote them; their weights do not.
        if file.endswith((".safetensors", ".gguf", ".bin", ".data")):
            assert new_manifest["checksums"][file] == old_manifest["checksums"][file], file


@pytest.mark.parametrize(
    "format",
    # Formats that run in torch are timed again and again while another test runs, so they take too long beside others.
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("safetensors", "slimfront")))
        for name in sorted(EXPECTED["verify"])
    ],
)
def test_an_old_export_is_verified_with_the_recorded_quality(studies: Path, format: str) -> None:
    rows = json.loads(slimfront("verify", f"exports/{format}", "--json", cwd=studies, codes=(0, 1)))
    current = {row["metric"]: row for row in rows}
    expected = {row["metric"]: row for row in EXPECTED["verify"][format]}
    assert current.keys() == expected.keys()
    for metric, row in current.items():
        assert row["recorded"] == expected[metric]["recorded"]
        if not metric.endswith(TIMES):
            # The recorded size is that of the study's own format, as it was at that commit.
            assert row["ok"] == expected[metric]["ok"]
            assert row["measured"] == pytest.approx(expected[metric]["measured"], rel=0.01)


def test_an_old_export_that_was_changed_is_refused(studies: Path) -> None:
    config = studies / "exports/slimfront/config.json"
    config.write_text(config.read_text() + "\n")
    slimfront("verify", "exports/slimfront", cwd=studies, codes=(3,))


def test_two_old_exports_are_compared(studies: Path) -> None:
    arguments = ("compare", "exports/openvino", "exports/onnx", "--json", "--pairs", 1)
    rows = {row["metric"]: row for row in json.loads(slimfront(*arguments, cwd=studies))}
    expected = {row["metric"]: row for row in EXPECTED["compare"]}
    assert rows.keys() == expected.keys()
    for metric, row in rows.items():
        if not metric.endswith(TIMES):
            for key in ("first", "second"):
                assert row[key] == pytest.approx(expected[metric][key], rel=0.01)


def test_a_trimmed_model_is_recreated_from_the_old_ledger(studies: Path) -> None:
    pick = EXPECTED["exports"]["slimfront"]
    record = json.loads((studies / f"finished store/records/artifacts/{pick}.json").read_text())
    digest = record["digest"]
    shutil.rmtree(studies / "finished store/objects" / digest[:2] / digest)
    arguments = ("export", "finished store/finished", "again", "--pick", pick, "--format", "slimfront")
    slimfront(*arguments, cwd=studies)
    old, new = (
        json.loads((studies / out / "recipe.json").read_text()) for out in ("exports/slimfront", "again")
    )
    assert new == old


@pytest.mark.ray
def test_an_interrupted_study_is_finished_and_no_committed_candidate_runs_again(studies: Path) -> None:
    store = studies / "interrupted store"
    ledger = store / "interrupted/ledger.db"
    initial_attempts, results = attempts_by_job(ledger), sorted((store / "records/results").iterdir())
    finished_jobs = {job_id for job_id, outcome in outcomes_by_job(ledger).items() if outcome == "success"}
    assert finished_jobs
    assert initial_attempts.keys() - finished_jobs, "no job was running when the study was killed"
    committed = {file: file.read_bytes() for file in results}
    slimfront("resume", "interrupted store/interrupted", cwd=studies)
    assert {job_id: attempts_by_job(ledger)[job_id] for job_id in finished_jobs} == {
        job_id: initial_attempts[job_id] for job_id in finished_jobs
    }
    assert outcomes_by_job(ledger).keys() == attempts_by_job(ledger).keys()
    assert {file: file.read_bytes() for file in results} == committed
    status = json.loads(slimfront("status", "interrupted store/interrupted", "--json", cwd=studies))
    assert status["stage"] == "done"
    assert status["candidates"] == EXPECTED["interrupted"]["status"]["candidates"] == 8
    assert status["measured"] == 9
    assert member_ids(store / "interrupted")


@pytest.mark.ray
def test_a_finished_study_is_resumed_without_a_new_attempt_or_another_front(studies: Path) -> None:
    folder = studies / "finished store/finished"
    initial_attempts = attempts_by_job(folder / "ledger.db")
    (studies / "finished.yaml").unlink()
    for file in ("front.json", "status.json", "report.html", "outbox.db"):
        (folder / file).unlink()
    study = folder / "study.yaml"
    study.write_text(study.read_text().replace('uri: "http://127.0.0.1:9"', "uri: none"))
    slimfront("resume", "finished store/finished", cwd=studies)
    assert attempts_by_job(folder / "ledger.db") == initial_attempts
    front = json.loads((folder / "front.json").read_text())
    assert with_new_standings(front) == with_new_standings(EXPECTED["finished"]["front"])


@pytest.mark.ray
def test_every_event_in_the_old_spelling_is_replayed(studies: Path) -> None:
    """The ledger holds an event of each class, with Granted("finishing") and Granted("nothing"), and a prediction of
    "foretold_divergence". Its stopped candidate stays stopped, and its search stays exhausted."""
    folder = studies / "every-name store/every-name"
    with sqlite3.connect(folder / "ledger.db") as database:
        kinds = {kind for (kind,) in database.execute("select kind from events")}
        text = " ".join(body for (body,) in database.execute("select body from events"))
    database.close()
    names = ("Began", "Proposed", "Started", "Ended", "Resized", "Stopped", "Exhausted", "Granted")
    assert kinds == set(names)
    for word in ('"finishing"', '"nothing"', '"foretold_divergence"', '"spared_seconds"'):
        assert word in text
    initial_attempts = attempts_by_job(folder / "ledger.db")
    slimfront("resume", "every-name store/every-name", cwd=studies)
    assert attempts_by_job(folder / "ledger.db") == initial_attempts
    status = json.loads(slimfront("status", "every-name store/every-name", "--json", cwd=studies))
    assert status["stage"] == "done"
    assert (status["measured"], status["stopped"], status["failed"]) == (3, 1, 0)
    assert status["exhausted"] == "there are no more choices"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_an_old_outbox_is_delivered_to_mlflow(studies: Path, tmp_path: Path) -> None:
    folder, uri = studies / "finished store/finished", f"sqlite:///{tmp_path / 'mlflow.db'}"
    # The outbox holds the absolute path of the store.
    slimfront("tracking", "sync", folder, "--uri", uri, cwd=studies)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("finished")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    status = EXPECTED["finished"]["status"]
    assert len(runs) == 1 + status["measured"] + status["failed"] + status["stopped"] + status["over_limit"]
    front = {run.data.tags["slimfront.candidate"] for run in runs if run.data.tags.get("pareto") == "true"}
    assert front == set(member_ids(folder))
