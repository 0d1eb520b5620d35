"""The mirror: delivers an outbox to MLflow, in a separate process. Only this file and registry.py import mlflow.

Every delivery is idempotent: runs are looked up by their tags before any is created, and repeated values are equal to
the earlier ones. So the process may be killed at any point, and an outage costs only time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# MLflow reads these on import. Its own retries block a call for minutes; ours are below.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import tenacity
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.study.front_snapshot import FrontSnapshot
from orchestrator.tracking.outbox import Delivered, Entry, Outbox
from orchestrator.tracking.registry import CANDIDATE_TAG, OUTBOX_TAG, Registry

POLL_SECONDS = 0.5
OUTAGE_POLL_SECONDS = 5.0
SYNC_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
"""The mirror gives up an unreachable MLflow after this time once its study has ended; `tracking sync` catches up."""

STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "measured": "FINISHED",
    "failed": "FAILED",
    # Not run to its end by decision: neither FINISHED nor FAILED in MLflow's terms.
    "over_limit": "KILLED",
    "stopped": "KILLED",
}
PARENT = "study"
MAX_TEXT = 4000  # characters; a tag holds 8000

log = logging.getLogger(__name__)


def follow(outbox: Path, uri: str, service: int) -> None:
    """Deliver new entries until the study is finished or its service has ended, and the outbox is empty.

    service: the process id of the service.
    """
    with _delivery_lock(outbox), closing(Outbox(outbox)) as box:
        mirror = Mirror(box, Delivered(outbox, uri), uri)
        last_needed = time.monotonic()
        while True:
            # Checked before the delivery, so that the service's last entry is delivered too.
            ended = os.getppid() != service or box.last()[1] == "finish"
            if not ended:
                last_needed = time.monotonic()
            try:
                mirror.deliver()
            except Exception as error:
                if not _is_transient(error) or time.monotonic() - last_needed > PATIENCE_SECONDS:
                    raise
                log.warning("%s cannot be reached: %s", uri, error)
                time.sleep(OUTAGE_POLL_SECONDS)
                continue
            if ended and not mirror.pending:
                return
            time.sleep(POLL_SECONDS)


def deliver_all(outbox: Path, uri: str) -> None:
    """Deliver the whole outbox. If a mirror delivers it already, wait until that has finished.

    Raises ConnectionError if MLflow stays unreachable.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(multiplier=0.5, max=10),
        stop=tenacity.stop_after_delay(SYNC_SECONDS),
    )
    with closing(Outbox(outbox)) as box:
        mirror = Mirror(box, Delivered(outbox, uri), uri)
        while mirror.pending:
            try:
                with _delivery_lock(outbox, wait=False):
                    retrying(mirror.deliver)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            except tenacity.RetryError as error:
                reason = error.last_attempt.exception()
                raise ConnectionError(f"{uri} was unreachable for {SYNC_SECONDS:g} s: {reason}") from reason


class Mirror:
    """Delivers one outbox to one MLflow. It only reads the outbox, so the service's appends never wait for it."""

    def __init__(self, box: Outbox, delivered: Delivered, uri: str) -> None:
        self._box = box
        self._delivered = delivered
        self._uri = uri
        self._runs: StudyRuns | None = None

    @property
    def pending(self) -> bool:
        """Whether the outbox has entries that are not delivered yet."""
        return self._box.last()[0] > self._delivered.number

    def deliver(self) -> None:
        """Deliver the pending entries once. An entry that MLflow refuses is logged and skipped."""
        for entry in self._box.entries_after(self._delivered.number):
            try:
                self._runs = self._runs or StudyRuns(_client(self._uri), self._box, self._uri)
                self._runs.write(entry)
            except (MlflowException, OSError) as error:
                # The effect of a broken call is unknown: look the runs up again.
                self._runs = None
                if _is_transient(error):
                    raise
                log.warning("%s refused %s %s: %s", self._uri, entry.kind, entry.subject, error)
            self._delivered.note(entry.number)


@dataclass
class KnownRun:
    """The state of a run in MLflow."""

    id: str
    status: str = "RUNNING"
    metrics: dict[str, float] = field(default_factory=dict)
    on_front: bool = False

    @staticmethod
    def of(run: Run) -> KnownRun:
        data = run.data
        return KnownRun(
            run.info.run_id, run.info.status, dict(data.metrics), data.tags.get("pareto") == "true"
        )


class StudyRuns:
    """The runs of one study in one MLflow, including those of earlier deliveries."""

    def __init__(self, client: MlflowClient, box: Outbox, uri: str) -> None:
        self._client = client
        self._outbox_id = box.id
        self._start = box.latest("start").content
        self._experiment = self._find_experiment(self._start["study"], uri)
        self._known = self._find_runs()
        self._parent = self._run(PARENT, self._start["study"])

    def write(self, entry: Entry) -> None:
        if entry.kind == "start":
            self._write_start(entry.content)
        elif entry.kind == "candidate":
            self._write_candidate(entry.content)
        else:
            self._write_finish(entry.content)

    def _write_start(self, start: Mapping[str, Any]) -> None:
        tags = {f"environment.{name}": value for name, value in start["environment"].items()}
        tags["objectives"] = ", ".join(f"{o['metric']} ({o['goal']})" for o in start["objectives"])
        self._client.log_batch(self._parent.id, tags=_tags({**tags, "state": "running"}))
        self._client.log_text(self._parent.id, start["yaml"], "study.yaml")
        self._set_status(self._parent, "RUNNING")

    def _write_candidate(self, candidate: Mapping[str, Any]) -> None:
        run = self._run(candidate["id"], candidate["recipe"])
        values = dict(candidate["metrics"])
        for name, error in candidate["errors"].items():
            values[f"{name}_stderr"] = error
        params = [Param(name, value) for name, value in candidate["params"].items()]
        self._log(run, values, params, _candidate_tags(candidate))
        self._set_status(run, STATUS[candidate["state"]])

    def _write_finish(self, finish: Mapping[str, Any]) -> None:
        front = FrontSnapshot.from_dict(finish["front"])
        members = {member.id for member in front.members}
        for candidate, run in self._known.items():
            if run.on_front != (candidate in members):
                run.on_front = candidate in members
                self._client.set_tag(run.id, "pareto", str(run.on_front).lower())
        self._client.log_text(self._parent.id, finish["report"], "front.html")
        self._client.log_dict(self._parent.id, front.to_dict(), "front.json")
        self._client.log_dict(self._parent.id, _table(front), "front_table.json")
        values = {f"candidates_{standing}": float(count) for standing, count in front.candidates.items()}
        if front.hypervolume is not None:
            values["hypervolume"] = front.hypervolume
        values |= finish.get("totals", {})  # entries of earlier versions have none
        # MLflow's web page finds the table among the artifacts by this tag.
        tables = json.dumps([{"path": "front_table.json", "type": "table"}])
        tags = {"state": "finished", "mlflow.loggedArtifacts": tables, "mlflow.note.content": _note(front)}
        self._log(self._parent, values, [], tags)
        self._set_status(self._parent, "FINISHED")
        self._register(front, finish.get("places", {}))  # entries of earlier versions have none

    def _register(self, front: FrontSnapshot, urls: Mapping[str, str]) -> None:
        runs = {member.id: self._run(member.id, member.recipe).id for member in front.members}
        Registry(self._client, self._experiment, self._outbox_id).show(front, runs, urls)

    def _log(
        self, run: KnownRun, values: Mapping[str, float], params: list[Param], tags: Mapping[str, str]
    ) -> None:
        now = int(time.time() * 1000)
        # An equal value logged again would become a second point of a curve.
        changed = [
            Metric(name, value, now, 0) for name, value in values.items() if run.metrics.get(name) != value
        ]
        self._client.log_batch(run.id, metrics=changed, params=params, tags=_tags(tags))
        run.metrics.update(values)

    def _set_status(self, run: KnownRun, status: str) -> None:
        if run.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(run.id, status=status)
        else:
            self._client.set_terminated(run.id, status)
        run.status = status

    def _run(self, candidate: str, name: str) -> KnownRun:
        """Return the candidate's run; create it if there is none."""
        if candidate not in self._known:
            tags = {OUTBOX_TAG: self._outbox_id, CANDIDATE_TAG: candidate}
            if candidate != PARENT:
                tags["mlflow.parentRunId"] = self._parent.id
            run = self._client.create_run(self._experiment, tags=tags, run_name=name[:250])
            self._known[candidate] = KnownRun.of(run)
        return self._known[candidate]

    def _find_runs(self) -> dict[str, KnownRun]:
        runs: dict[str, KnownRun] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{OUTBOX_TAG}` = '{self._outbox_id}'", page_token=token
            )
            runs |= {run.data.tags[CANDIDATE_TAG]: KnownRun.of(run) for run in page}
            token = page.token
            if not token:
                return runs

    def _find_experiment(self, study: str, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(study)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        file = _database_file(uri)
        if file is not None:
            # Without a server MLflow would write artifacts into the working folder of this process.
            location = (file.parent / "mlflow-artifacts" / study).as_uri()
        # MLflow's web page shows an experiment without a kind as chat traces instead of training runs.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(study, artifact_location=location, tags=kind))


def _candidate_tags(candidate: Mapping[str, Any]) -> dict[str, str]:
    tags = {
        "recipe": candidate["recipe"],
        "state": candidate["state"],
        "attempts": str(candidate["attempts"]),
        **{f"environment.{name}": value for name, value in candidate["environment"].items()},
    }
    if candidate["artifact"]:
        tags["artifact"] = candidate["artifact"]
    if candidate["unreliable"]:
        tags["unreliable"] = ", ".join(candidate["unreliable"])
    if candidate.get("stopped"):  # entries of earlier versions have none
        tags["stopped"] = candidate["stopped"]
    if candidate["failure"]:
        tags["failure.kind"] = candidate["failure"]["kind"]
        tags["failure.message"] = candidate["failure"]["message"]
    return tags


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value[:MAX_TEXT]) for name, value in tags.items()]


def _table(front: FrontSnapshot) -> dict[str, Any]:
    """The front in the format of MLflow's logged tables."""
    metrics = [objective.metric for objective in front.objectives]
    rows = []
    for member in front.members:
        values = [member.measured.metrics[metric] for metric in metrics]
        rows.append([member.id, member.recipe, *values])
    return {"columns": ["candidate", "recipe", *metrics], "data": rows}


def _note(front: FrontSnapshot) -> str:
    """The front as the run's description, in Markdown. Rows beyond the size limit of a tag are omitted."""
    table = _table(front)
    lines = [table["columns"], ["---"] * len(table["columns"])]
    for id, recipe, *values in table["data"]:
        lines.append([id, recipe, *(f"{value:,.6g}" for value in values)])
    text = f"{len(front.members)} models on the front, smallest first.\n\n"
    for line in lines:
        row = "| " + " | ".join(line) + " |\n"
        if len(text) + len(row) > MAX_TEXT:
            break
        text += row
    return text


def _client(uri: str) -> MlflowClient:
    file = _database_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    # These loggers announce a new database in a dozen lines, one for each table.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def _database_file(uri: str) -> Path | None:
    """Return the SQLite file of a tracking address without a server; None for a server's address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).absolute()


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: the server is unreachable or busy, or it refuses the credentials, which
    its owner may change."""
    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status >= 500 or status in (401, 403, 429)
    return isinstance(error, OSError)


@contextmanager
def _delivery_lock(outbox: Path, wait: bool = True) -> Iterator[None]:
    """Hold the outbox's lock, since two deliveries at a time could both create the same run.

    The lock ends with its process. Raises BlockingIOError if another process has it and `wait` is false.
    """
    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    with outbox.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, operation)
        yield
