"""The MLflow mirror writes complete runs, and failures neither lose nor duplicate an entry."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs import techniques
from jobs.job import Failure
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import judge
from orchestrator.tracking import MLflowTracker, candidate_entry, mlflow_mirror, options, sync
from orchestrator.tracking.outbox import Delivered, Outbox
from orchestrator.tracking.registry import CANDIDATE_TAG

# MLflow 3.17 still uses a loader strategy that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

OBJECTIVES = [Objective("size_bytes"), Objective("accuracy", "max")]
ORIGINAL = Recipe(Origin("model", "data", 0))


def recipe(dropped: int) -> Recipe:
    return ORIGINAL.then(techniques.load("drop_layers").of({"count": dropped}))


def measured(dropped: int, size: int, accuracy: float, **metrics: float) -> Candidate:
    measurement = Measurement(
        {"size_bytes": float(size), "accuracy": accuracy, **metrics}, {"accuracy": 0.01}
    )
    return Candidate(recipe(dropped), "measured", size, artifact=f"sha-{dropped}", measurement=measurement)


def test_the_error_of_a_prediction_is_a_metric_and_the_prediction_is_not() -> None:
    candidate = dataclasses.replace(measured(1, 80, 0.7, decode_ms=5.0), predicted={"decode_ms": 5.5})
    metrics = candidate_entry(candidate)["metrics"]
    assert metrics["decode_ms_predicted_error"] == pytest.approx(0.1)
    assert set(metrics) == {"size_bytes", "accuracy", "decode_ms", "decode_ms_predicted_error"}


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an empty MLflow database once: creation takes seconds, and a copy does not."""
    file = tmp_path_factory.mktemp("mlflow") / "new.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(new_database: Path, tmp_path: Path) -> str:
    shutil.copy(new_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "study" / "outbox.sqlite"


@pytest.fixture
def tracker(uri: str, outbox: Path, monkeypatch: pytest.MonkeyPatch) -> MLflowTracker:
    """Return a tracker without a mirror process; the test delivers with `sync`."""
    monkeypatch.setattr(MLflowTracker, "_ensure_mirror", lambda self: None)
    tracker = MLflowTracker(uri, outbox)
    tracker.start("laptop", "name: laptop\n", {"cpu": "Xeon"}, OBJECTIVES)
    return tracker


def runs_of(uri: str) -> dict[str, Run]:
    """Return all runs by name; fail if two runs have the same name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    runs: list[Run] = []
    if experiment:
        runs = list(client.search_runs([experiment.experiment_id]))
    by_name = {run.info.run_name: run for run in runs}
    assert len(by_name) == len(runs), "two runs have the same name"
    return by_name


def test_a_candidate_is_one_nested_run_with_flat_params_metrics_and_errors(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    tracker.record(measured(2, 80, 0.7))
    sync(outbox, uri)
    runs = runs_of(uri)
    run = runs["drop_layers(count=2)"]
    assert run.data.params == {"drop_layers.count": "2"}
    assert run.data.metrics == {"size_bytes": 80.0, "accuracy": 0.7, "accuracy_stderr": 0.01}
    assert run.data.tags["mlflow.parentRunId"] == runs["laptop"].info.run_id
    assert run.data.tags["slimfront.candidate"] == recipe(2).id
    assert run.data.tags["state"] == "measured"
    assert run.info.status == "FINISHED"


def test_the_parent_run_is_the_study(tracker: MLflowTracker, uri: str, outbox: Path) -> None:
    sync(outbox, uri)
    run = runs_of(uri)["laptop"]
    assert run.info.status == "RUNNING"
    assert run.data.tags["environment.cpu"] == "Xeon"
    assert text_of(uri, run, "study.yaml") == "name: laptop\n"


def test_failed_stopped_and_over_limit_candidates_are_runs_with_their_reason(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    tracker.record(Candidate(recipe(1), "failed", 90, failure=Failure("diverged", "NaN in block 3")))
    tracker.record(Candidate(recipe(2), "over_limit", 80))
    tracker.record(Candidate(recipe(3), "stopped", 70, stopped="hopeless"))
    sync(outbox, uri)
    failed, over_limit, stopped = (runs_of(uri)[f"drop_layers(count={count})"] for count in (1, 2, 3))
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure.kind"] == "diverged"
    assert failed.data.tags["failure.message"] == "NaN in block 3"
    assert over_limit.info.status == "KILLED"
    assert over_limit.data.tags["state"] == "over_limit"
    assert over_limit.data.metrics == {"size_bytes": 80.0}
    assert stopped.info.status == "KILLED"
    assert (stopped.data.tags["state"], stopped.data.tags["stopped"]) == ("stopped", "hopeless")


def test_later_measurements_are_added_to_the_same_run(tracker: MLflowTracker, uri: str, outbox: Path) -> None:
    tracker.record(Candidate(recipe(2), "running", 80))
    sync(outbox, uri)
    tracker.record(measured(2, 80, 0.7))
    sync(outbox, uri)
    tracker.record(measured(2, 80, 0.7, decode_ms=5.0))
    sync(outbox, uri)
    run = runs_of(uri)["drop_layers(count=2)"]
    assert run.data.metrics["decode_ms"] == 5.0
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "accuracy")
    assert len(history) == 1, "an unchanged value adds no point to the curve"


def test_at_the_end_the_front_is_tagged_and_its_plots_are_artifacts(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7), measured(2, 90, 0.6)]
    for candidate in candidates:
        tracker.record(candidate)
    totals = {"node_hours": 2.0, "cost": 1.8}
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "<html>the front</html>", totals)
    sync(outbox, uri)
    runs = runs_of(uri)
    assert {name for name, run in runs.items() if run.data.tags.get("pareto") == "true"} == {
        "original", "drop_layers(count=1)",
    }  # fmt: skip
    parent = runs["laptop"]
    assert parent.info.status == "FINISHED"
    assert {name: parent.data.metrics[name] for name in totals} == totals
    assert text_of(uri, parent, "front.html") == "<html>the front</html>"
    assert json.loads(text_of(uri, parent, "front.json"))["members"][0]["id"] == candidates[1].id
    table = json.loads(text_of(uri, parent, "front_table.json"))
    assert table["columns"] == ["candidate", "recipe", "size_bytes", "accuracy"]
    assert table["data"][0][2:] == [80.0, 0.7]


def test_a_candidate_that_leaves_the_front_of_a_resumed_study_loses_the_tag(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    for candidate in candidates:
        tracker.record(candidate)
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "")
    sync(outbox, uri)
    candidates.append(measured(2, 70, 0.75))
    tracker.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    tracker.record(candidates[2])
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "")
    sync(outbox, uri)
    tags = {name: run.data.tags.get("pareto") for name, run in runs_of(uri).items()}
    assert tags["drop_layers(count=1)"] == "false"
    assert tags["drop_layers(count=2)"] == "true"


def finish(tracker: MLflowTracker, candidates: list[Candidate]) -> None:
    for candidate in candidates:
        tracker.record(candidate)
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "")


def aliases_of(uri: str) -> dict[str, str]:
    """Return the id of the candidate of each alias."""
    client = MlflowClient(uri)
    versions = client.get_registered_model("laptop").aliases
    return {
        alias: client.get_model_version("laptop", version).tags[CANDIDATE_TAG]
        for alias, version in versions.items()
    }


def versions_of(uri: str) -> dict[str, str]:
    """Return the front tag of each registered candidate; fail if a candidate has two versions."""
    versions = list(MlflowClient(uri).search_model_versions("name = 'laptop'"))
    by_candidate = {version.tags[CANDIDATE_TAG]: version.tags["pareto"] for version in versions}
    assert len(by_candidate) == len(versions), "a candidate has two versions"
    return by_candidate


def test_only_front_members_are_registered_and_have_aliases(
    uri: str, outbox: Path, tracker: MLflowTracker
) -> None:
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7), measured(2, 90, 0.6)]
    finish(tracker, candidates)
    sync(outbox, uri)
    assert versions_of(uri) == {candidates[0].id: "true", candidates[1].id: "true"}
    aliases = aliases_of(uri)
    assert aliases["smallest"] == candidates[1].id
    assert aliases["most-accurate"] == candidates[0].id
    assert set(aliases) == {"knee", "smallest", "most-accurate"}, "no objective defines the fastest member"


def test_a_registered_model_has_its_run_its_metrics_and_the_location_of_its_files(
    uri: str, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLflowTracker, "_ensure_mirror", lambda self: None)
    tracker = MLflowTracker(uri, outbox, lambda digest: f"s3://bucket/objects/{digest}/files")
    tracker.start("laptop", "", {}, OBJECTIVES)
    finish(tracker, [measured(0, 100, 0.8), measured(1, 80, 0.7)])
    sync(outbox, uri)
    client, run = MlflowClient(uri), runs_of(uri)["drop_layers(count=1)"]
    version = client.get_model_version_by_alias("laptop", "smallest")
    assert version.run_id == run.info.run_id
    assert version.tags["stored_at"] == "s3://bucket/objects/sha-1/files"
    models = client.search_logged_models([run.info.experiment_id])
    (model,) = [item for item in models if item.source_run_id == run.info.run_id]
    assert (model.status, model.params) == ("READY", {"drop_layers.count": "1"})
    assert {item.key: item.value for item in model.metrics or []} == run.data.metrics
    assert model.tags["stored_at"] == version.tags["stored_at"]
    assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 1, (
        "a value delivered twice adds no point to the curve"
    )


def test_a_resumed_or_redelivered_study_moves_the_aliases_and_registers_no_candidate_twice(
    uri: str, outbox: Path, tracker: MLflowTracker
) -> None:
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    finish(tracker, candidates)
    sync(outbox, uri)
    MlflowClient(uri).set_registered_model_alias("laptop", "deployed", "1")
    candidates.append(measured(2, 70, 0.75))
    tracker.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    finish(tracker, candidates)
    sync(outbox, uri)
    outbox.with_suffix(".delivered").unlink()
    sync(outbox, uri)
    assert versions_of(uri) == {candidates[0].id: "true", candidates[1].id: "false", candidates[2].id: "true"}
    assert aliases_of(uri)["smallest"] == candidates[2].id
    assert "deployed" in aliases_of(uri), "an alias of the user stays"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    assert experiment is not None
    assert len(client.search_logged_models([experiment.experiment_id])) == 3


def test_an_empty_front_removes_the_aliases(uri: str, outbox: Path, tracker: MLflowTracker) -> None:
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    finish(tracker, candidates)
    sync(outbox, uri)
    tracker.finish(judge("laptop", [Objective("size_bytes", limit=1.0)], candidates[0], candidates), "")
    sync(outbox, uri)
    assert aliases_of(uri) == {}
    assert set(versions_of(uri).values()) == {"false"}


def test_an_interrupted_study_resumes_in_the_same_parent_run(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    tracker.record(measured(1, 80, 0.7))
    sync(outbox, uri)
    resumed = MLflowTracker(uri, outbox)
    resumed.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    resumed.record(measured(1, 80, 0.7))
    resumed.record(measured(2, 70, 0.6))
    sync(outbox, uri)
    assert set(runs_of(uri)) == {"laptop", "drop_layers(count=1)", "drop_layers(count=2)"}


def test_another_study_of_the_same_name_gets_its_own_parent_in_the_same_experiment(
    tracker: MLflowTracker, uri: str, outbox: Path, tmp_path: Path
) -> None:
    second_tracker = MLflowTracker(uri, tmp_path / "other" / "outbox.sqlite")
    second_tracker.start("laptop", "", {}, OBJECTIVES)
    sync(outbox, uri)
    sync(tmp_path / "other" / "outbox.sqlite", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_kill_between_the_creation_and_the_record_of_a_run_causes_no_second_run(
    tracker: MLflowTracker, uri: str, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.record(measured(1, 80, 0.7))
    create_run = MlflowClient.create_run

    def create_and_die(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        create_run(self, *args, **kwargs)
        raise KeyboardInterrupt

    for _ in range(2):  # first for the parent run, then for the candidate
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "create_run", create_and_die)
            with pytest.raises(KeyboardInterrupt):
                sync(outbox, uri)
    sync(outbox, uri)
    assert set(runs_of(uri)) == {"laptop", "drop_layers(count=1)"}
    assert runs_of(uri)["drop_layers(count=1)"].info.status == "FINISHED"


def test_an_entry_that_mlflow_refuses_does_not_block_others(
    tracker: MLflowTracker, uri: str, outbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Outbox(outbox).append("candidate", {**_entry(), "metrics": {"no/../good": 1.0}}, "bad")
    tracker.record(measured(1, 80, 0.7))
    sync(outbox, uri)
    assert runs_of(uri)["drop_layers(count=1)"].info.status == "FINISHED"
    assert "refused candidate bad" in caplog.text


def _entry() -> dict[str, Any]:
    return {
        "id": "bad", "recipe": "bad", "state": "measured", "artifact": None, "attempts": 1, "params": {},
        "metrics": {}, "errors": {}, "unreliable": [], "environment": {}, "failure": None,
    }  # fmt: skip


def test_another_mlflow_gets_the_whole_study(
    tracker: MLflowTracker, uri: str, outbox: Path, new_database: Path, tmp_path: Path
) -> None:
    tracker.record(measured(1, 80, 0.7))
    sync(outbox, uri)
    shutil.copy(new_database, tmp_path / "second.db")
    second = f"sqlite:///{tmp_path / 'second.db'}"
    sync(outbox, second)
    assert set(runs_of(second)) == set(runs_of(uri))


def test_a_repeated_step_keeps_the_options_of_both() -> None:
    repeated = recipe(1).then(techniques.load("drop_layers").of({"count": 2}))
    assert options(Candidate(repeated, "waiting", 1)) == {
        "drop_layers.count": "1",
        "drop_layers_2.count": "2",
    }


def test_values_that_are_not_numbers_never_enter_the_outbox(outbox: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Outbox(outbox).append("candidate", {"metrics": {"accuracy": float("nan")}})


SERVICE = """
import os, signal, sys
from pathlib import Path
from jobs.recipe import Origin, Recipe
from orchestrator.study.candidate import Candidate
from orchestrator.pareto.front import Objective
from orchestrator.tracking import MLflowTracker

tracker = MLflowTracker(sys.argv[1], Path(sys.argv[2]))
tracker.start("laptop", "", {}, [Objective("size_bytes")])
tracker.record(Candidate(Recipe(Origin("model", "data", 0)), "over_limit", 100))
print(tracker._mirror.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_of_the_service_the_mirror_delivers_pending_entries_and_ends(
    uri: str, outbox: Path
) -> None:
    service = subprocess.run(
        [sys.executable, "-c", SERVICE, uri, str(outbox)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert service.returncode == -signal.SIGKILL
    wait_until(lambda: not running(int(service.stdout)))
    assert set(runs_of(uri)) == {"laptop", "original"}


def test_the_mirror_of_a_finished_study_ends_while_the_service_runs(uri: str, outbox: Path) -> None:
    tracker = MLflowTracker(uri, outbox)
    candidates = [measured(0, 100, 0.8)]
    tracker.start("laptop", "", {}, OBJECTIVES)
    tracker.record(candidates[0])
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "")
    assert tracker._mirror is not None
    assert tracker._mirror.wait(60) == 0
    assert runs_of(uri)["laptop"].info.status == "FINISHED"


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def serve(address: str, uri: str, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that starts an MLflow server at the address with additional options."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(*options: str, **env: str) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
        command += ["--port", address.rpartition(":")[2], *options]
        with (tmp_path / "server.log").open("wb") as log:
            servers.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **env}
                )
            )

    yield start
    for server in servers:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


@pytest.mark.cluster
@pytest.mark.parametrize("through_the_server", [True, False])
def test_files_reach_the_bucket_of_a_shared_server_through_the_server_or_directly(
    through_the_server: bool,
    serve: Callable[..., None],
    address: str,
    outbox: Path,
    tracker: MLflowTracker,
    s3: Any,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = f"mlflow-{outbox.parent.parent.name.lower().replace('_', '-')[-20:]}"
    s3.create_bucket(Bucket=bucket)
    hosts = ["--allowed-hosts", f"mlflow.example.org,{address.removeprefix('http://')}"]
    if through_the_server:
        serve(*hosts, "--artifacts-destination", f"s3://{bucket}/files", MLFLOW_S3_ENDPOINT_URL=s3_server)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")  # only the server needs the bucket
    else:
        serve(*hosts, "--no-serve-artifacts", "--default-artifact-root", f"s3://{bucket}/files")
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_server)
    finish(tracker, [measured(0, 100, 0.8), measured(1, 80, 0.7)])
    wait_until(lambda: _healthy(address))
    sync(outbox, address)
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(key.startswith("files/") and key.endswith("/front.json") for key in keys)
    assert aliases_of(address)["smallest"] == recipe(1).id
    foreign_request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.org"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign_request)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_starts_late_receives_all_earlier_entries(
    serve: Callable[..., None], address: str, outbox: Path, tmp_path: Path
) -> None:
    tracker = MLflowTracker(address, outbox)
    candidates = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    tracker.start("laptop", "", {}, OBJECTIVES)
    for candidate in candidates:
        tracker.record(candidate)
    tracker.finish(judge("laptop", OBJECTIVES, candidates[0], candidates), "<html></html>")
    wait_until(lambda: "cannot be reached" in outbox.with_suffix(".log").read_text())
    serve("--artifacts-destination", str(tmp_path / "served"))
    assert tracker._mirror is not None
    assert tracker._mirror.wait(150) == 0
    assert Delivered(outbox, address).number == Outbox(outbox).last()[0]
    runs = runs_of(address)
    assert set(runs) == {"laptop", "original", "drop_layers(count=1)"}
    assert text_of(address, runs["laptop"], "front.html") == "<html></html>"
    assert aliases_of(address)["smallest"] == candidates[1].id


def test_the_sync_with_an_unreachable_server_reports_its_address(
    outbox: Path, tracker: MLflowTracker, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "SYNC_SECONDS", 1.0)
    with pytest.raises(ConnectionError, match=address):
        sync(outbox, address)


@pytest.mark.parametrize("status", [401, 403])
def test_entries_that_a_server_rejected_for_lack_of_access_stay_undelivered(
    status: int, outbox: Path, tracker: MLflowTracker, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(mlflow_mirror, "SYNC_SECONDS", 1.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConnectionError, match=str(status)):
            sync(outbox, address)
        server.shutdown()
    assert Delivered(outbox, address).number == 0


def text_of(uri: str, run: Run, artifact: str) -> str:
    """Read an artifact in the same way as the UI."""
    import mlflow.artifacts

    mlflow.set_tracking_uri(uri)
    return str(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{artifact}"))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # On a system that does not reap orphans, ended processes stay as zombies.
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
