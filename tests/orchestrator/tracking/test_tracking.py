"""The mirror into MLflow: what it writes, and that nothing is lost or doubled whatever breaks."""

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


def measured(dropped: int, size: int, accuracy: float, **more: float) -> Candidate:
    known = Measurement({"size_bytes": float(size), "accuracy": accuracy, **more}, {"accuracy": 0.01})
    return Candidate(recipe(dropped), "measured", size, artifact=f"sha-{dropped}", measurement=known)


def test_the_error_of_a_prediction_is_a_metric_and_the_prediction_is_none() -> None:
    one = dataclasses.replace(measured(1, 80, 0.7, decode_ms=5.0), predicted={"decode_ms": 5.5})
    found = candidate_entry(one)["metrics"]
    assert found["decode_ms_predicted_error"] == pytest.approx(0.1)
    assert set(found) == {"size_bytes", "accuracy", "decode_ms", "decode_ms_predicted_error"}


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it does not."""
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
    """A tracker whose test delivers by itself, with `sync`."""
    monkeypatch.setattr(MLflowTracker, "_ensure_mirror", lambda self: None)
    tracker = MLflowTracker(uri, outbox)
    tracker.start("laptop", "name: laptop\n", {"cpu": "Xeon"}, OBJECTIVES)
    return tracker


def runs_of(uri: str) -> dict[str, Run]:
    """Every run by its name; fails where two have the same."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    found = list(client.search_runs([experiment.experiment_id])) if experiment else []
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found), "two runs of one name"
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


def test_failures_and_what_was_over_a_limit_are_runs_that_say_so(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    tracker.record(Candidate(recipe(1), "failed", 90, failure=Failure("diverged", "NaN in block 3")))
    tracker.record(Candidate(recipe(2), "over_limit", 80))
    tracker.record(Candidate(recipe(3), "stopped", 70, stopped="hopeless"))
    sync(outbox, uri)
    failed, over, stopped = (runs_of(uri)[f"drop_layers(count={count})"] for count in (1, 2, 3))
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure.kind"] == "diverged"
    assert failed.data.tags["failure.message"] == "NaN in block 3"
    assert over.info.status == "KILLED"
    assert over.data.tags["state"] == "over_limit"
    assert over.data.metrics == {"size_bytes": 80.0}
    assert stopped.info.status == "KILLED"
    assert (stopped.data.tags["state"], stopped.data.tags["stopped"]) == ("stopped", "hopeless")


def test_what_is_measured_later_joins_the_same_run(tracker: MLflowTracker, uri: str, outbox: Path) -> None:
    tracker.record(Candidate(recipe(2), "running", 80))
    sync(outbox, uri)
    tracker.record(measured(2, 80, 0.7))
    sync(outbox, uri)
    tracker.record(measured(2, 80, 0.7, decode_ms=5.0))
    sync(outbox, uri)
    run = runs_of(uri)["drop_layers(count=2)"]
    assert run.data.metrics["decode_ms"] == 5.0
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "accuracy")
    assert len(history) == 1, "a value that did not change is no curve"


def test_at_the_finish_the_front_is_tagged_and_its_pictures_are_artifacts(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7), measured(2, 90, 0.6)]
    for one in told:
        tracker.record(one)
    totals = {"node_hours": 2.0, "cost": 1.8}
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "<html>the front</html>", totals)
    sync(outbox, uri)
    runs = runs_of(uri)
    assert {name for name, run in runs.items() if run.data.tags.get("pareto") == "true"} == {
        "original", "drop_layers(count=1)",
    }  # fmt: skip
    parent = runs["laptop"]
    assert parent.info.status == "FINISHED"
    assert {name: parent.data.metrics[name] for name in totals} == totals
    assert text_of(uri, parent, "front.html") == "<html>the front</html>"
    assert json.loads(text_of(uri, parent, "front.json"))["members"][0]["id"] == told[1].id
    table = json.loads(text_of(uri, parent, "front_table.json"))
    assert table["columns"] == ["candidate", "recipe", "size_bytes", "accuracy"]
    assert table["data"][0][2:] == [80.0, 0.7]


def test_who_leaves_the_front_when_a_study_goes_on_loses_the_tag(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    for one in told:
        tracker.record(one)
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "")
    sync(outbox, uri)
    told.append(measured(2, 70, 0.75))
    tracker.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    tracker.record(told[2])
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "")
    sync(outbox, uri)
    tags = {name: run.data.tags.get("pareto") for name, run in runs_of(uri).items()}
    assert tags["drop_layers(count=1)"] == "false"
    assert tags["drop_layers(count=2)"] == "true"


def finish(tracker: MLflowTracker, told: list[Candidate]) -> None:
    for one in told:
        tracker.record(one)
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "")


def aliases_of(uri: str) -> dict[str, str]:
    """The candidate that each alias names."""
    client = MlflowClient(uri)
    found = client.get_registered_model("laptop").aliases
    return {
        alias: client.get_model_version("laptop", number).tags[CANDIDATE_TAG]
        for alias, number in found.items()
    }


def versions_of(uri: str) -> dict[str, str]:
    """Whether each registered candidate is on the front; fails where one has two versions."""
    found = list(MlflowClient(uri).search_model_versions("name = 'laptop'"))
    by_candidate = {one.tags[CANDIDATE_TAG]: one.tags["pareto"] for one in found}
    assert len(by_candidate) == len(found), "two versions of one candidate"
    return by_candidate


def test_front_members_alone_are_registered_and_the_aliases_name_them(
    uri: str, outbox: Path, tracker: MLflowTracker
) -> None:
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7), measured(2, 90, 0.6)]
    finish(tracker, told)
    sync(outbox, uri)
    assert versions_of(uri) == {told[0].id: "true", told[1].id: "true"}
    found = aliases_of(uri)
    assert found["smallest"] == told[1].id
    assert found["most-accurate"] == told[0].id
    assert set(found) == {"knee", "smallest", "most-accurate"}, "no objective says which is fastest"


def test_a_registered_model_tells_its_run_its_numbers_and_where_its_files_lie(
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
    (model,) = [one for one in models if one.source_run_id == run.info.run_id]
    assert (model.status, model.params) == ("READY", {"drop_layers.count": "1"})
    assert {one.key: one.value for one in model.metrics or []} == run.data.metrics
    assert model.tags["stored_at"] == version.tags["stored_at"]
    assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 1, "a value told twice is no curve"


def test_a_study_that_goes_on_or_is_delivered_again_moves_the_aliases_and_registers_nobody_twice(
    uri: str, outbox: Path, tracker: MLflowTracker
) -> None:
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    finish(tracker, told)
    sync(outbox, uri)
    MlflowClient(uri).set_registered_model_alias("laptop", "deployed", "1")
    told.append(measured(2, 70, 0.75))
    tracker.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    finish(tracker, told)
    sync(outbox, uri)
    outbox.with_suffix(".delivered").unlink()
    sync(outbox, uri)
    assert versions_of(uri) == {told[0].id: "true", told[1].id: "false", told[2].id: "true"}
    assert aliases_of(uri)["smallest"] == told[2].id
    assert "deployed" in aliases_of(uri), "an alias that is not ours stays"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    assert experiment is not None
    assert len(client.search_logged_models([experiment.experiment_id])) == 3


def test_a_front_that_is_empty_now_takes_the_aliases_back(
    uri: str, outbox: Path, tracker: MLflowTracker
) -> None:
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    finish(tracker, told)
    sync(outbox, uri)
    tracker.finish(judge("laptop", [Objective("size_bytes", limit=1.0)], told[0], told), "")
    sync(outbox, uri)
    assert aliases_of(uri) == {}
    assert set(versions_of(uri).values()) == {"false"}


def test_an_interrupted_study_goes_on_in_the_same_parent_run(
    tracker: MLflowTracker, uri: str, outbox: Path
) -> None:
    tracker.record(measured(1, 80, 0.7))
    sync(outbox, uri)
    again = MLflowTracker(uri, outbox)
    again.start("laptop", "name: laptop\n", {}, OBJECTIVES)
    again.record(measured(1, 80, 0.7))
    again.record(measured(2, 70, 0.6))
    sync(outbox, uri)
    assert set(runs_of(uri)) == {"laptop", "drop_layers(count=1)", "drop_layers(count=2)"}


def test_another_study_of_the_same_name_gets_its_own_parent_in_the_same_experiment(
    tracker: MLflowTracker, uri: str, outbox: Path, tmp_path: Path
) -> None:
    other = MLflowTracker(uri, tmp_path / "other" / "outbox.sqlite")
    other.start("laptop", "", {}, OBJECTIVES)
    sync(outbox, uri)
    sync(tmp_path / "other" / "outbox.sqlite", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("laptop")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_killed_after_making_a_run_and_before_noting_it_there_is_still_one_run(
    tracker: MLflowTracker, uri: str, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.record(measured(1, 80, 0.7))
    genuine = MlflowClient.create_run

    def create_and_die(self: MlflowClient, *given: Any, **named: Any) -> None:
        genuine(self, *given, **named)
        raise KeyboardInterrupt

    for _ in range(2):  # first the parent's run, then the candidate's
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "create_run", create_and_die)
            with pytest.raises(KeyboardInterrupt):
                sync(outbox, uri)
    sync(outbox, uri)
    assert set(runs_of(uri)) == {"laptop", "drop_layers(count=1)"}
    assert runs_of(uri)["drop_layers(count=1)"].info.status == "FINISHED"


def test_an_entry_that_mlflow_refuses_does_not_hold_up_the_others(
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


def test_a_step_that_comes_twice_keeps_both_its_options() -> None:
    twice = recipe(1).then(techniques.load("drop_layers").of({"count": 2}))
    assert options(Candidate(twice, "waiting", 1)) == {"drop_layers.count": "1", "drop_layers_2.count": "2"}


def test_numbers_that_are_none_never_enter_the_outbox(outbox: Path) -> None:
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


def test_after_the_service_is_killed_the_mirror_delivers_the_rest_and_ends(uri: str, outbox: Path) -> None:
    service = subprocess.run(
        [sys.executable, "-c", SERVICE, uri, str(outbox)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert service.returncode == -signal.SIGKILL
    wait_until(lambda: not running(int(service.stdout)))
    assert set(runs_of(uri)) == {"laptop", "original"}


def test_the_mirror_of_a_finished_study_ends_though_the_service_lives(uri: str, outbox: Path) -> None:
    tracker = MLflowTracker(uri, outbox)
    told = [measured(0, 100, 0.8)]
    tracker.start("laptop", "", {}, OBJECTIVES)
    tracker.record(told[0])
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "")
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
    """Starts an MLflow server at the address, with more options than the necessary."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(*more: str, **env: str) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
        command += ["--port", address.rpartition(":")[2], *more]
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
def test_a_teams_server_puts_files_into_a_bucket_or_lets_studies_put_them_there(
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
    held = [one["Key"] for one in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(key.startswith("files/") and key.endswith("/front.json") for key in held)
    assert aliases_of(address)["smallest"] == recipe(1).id
    stranger = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.org"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(stranger)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_comes_up_late_gets_all_that_was_recorded_while_it_was_down(
    serve: Callable[..., None], address: str, outbox: Path, tmp_path: Path
) -> None:
    tracker = MLflowTracker(address, outbox)
    told = [measured(0, 100, 0.8), measured(1, 80, 0.7)]
    tracker.start("laptop", "", {}, OBJECTIVES)
    for one in told:
        tracker.record(one)
    tracker.finish(judge("laptop", OBJECTIVES, told[0], told), "<html></html>")
    wait_until(lambda: "cannot be reached" in outbox.with_suffix(".log").read_text())
    serve("--artifacts-destination", str(tmp_path / "served"))
    assert tracker._mirror is not None
    assert tracker._mirror.wait(150) == 0
    assert Delivered(outbox, address).number == Outbox(outbox).last()[0]
    runs = runs_of(address)
    assert set(runs) == {"laptop", "original", "drop_layers(count=1)"}
    assert text_of(address, runs["laptop"], "front.html") == "<html></html>"
    assert aliases_of(address)["smallest"] == told[1].id


def test_the_sync_of_an_unreachable_server_says_so(
    outbox: Path, tracker: MLflowTracker, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "SYNC_SECONDS", 1.0)
    with pytest.raises(ConnectionError, match=address):
        sync(outbox, address)


@pytest.mark.parametrize("status", [401, 403])
def test_what_a_server_that_does_not_let_us_in_was_not_given_is_delivered_when_it_does(
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
    """An artifact, read as the UI reads it."""
    import mlflow.artifacts

    mlflow.set_tracking_uri(uri)
    return str(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{artifact}"))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # Where nothing reaps orphans, the ended ones stay as zombies.
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
