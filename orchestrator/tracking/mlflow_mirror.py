"""Mirror: carries an outbox to MLflow. With registry.py the door to mlflow; runs in a process of its own.

Every delivery can be repeated: runs are looked up by their tags before any is made, and what an earlier
delivery wrote is written again with the same values. So it may be killed anywhere, and an outage costs time.
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

# Read when mlflow is imported. Its own retries block a call for minutes; ours are below.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import tenacity
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.tracking.outbox import Delivered, Entry, Outbox
from orchestrator.tracking.registry import CANDIDATE_TAG, OUTBOX_TAG, Registry

POLL_SECONDS = 0.5
OUTAGE_POLL_SECONDS = 5.0
SYNC_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
"""How long a mirror tries to reach MLflow when nobody waits for it any more; `tracking sync` catches up."""

STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "measured": "FINISHED",
    "failed": "FAILED",
    # Never ran to its end, by decision: in MLflow's words neither finished nor failed.
    "over_limit": "KILLED",
    "stopped": "KILLED",
}
PARENT = "study"
MAX_TEXT = 4000  # of a tag's 8000 characters

log = logging.getLogger(__name__)


def follow(outbox: Path, uri: str, service: int) -> None:
    """Deliver what is appended, until the study is finished or the service is gone, and all is delivered."""
    with _alone(outbox), closing(Outbox(outbox)) as box:
        mirror = Mirror(box, Delivered(outbox, uri), uri)
        needed = time.monotonic()
        while True:
            # Asked before delivering: what the service appended last is then delivered too.
            ended = os.getppid() != service or box.last()[1] == "finish"
            needed = needed if ended else time.monotonic()
            try:
                mirror.deliver()
            except Exception as error:
                if not _passing(error) or time.monotonic() - needed > PATIENCE_SECONDS:
                    raise
                log.warning("%s cannot be reached: %s", uri, error)
                time.sleep(OUTAGE_POLL_SECONDS)
                continue
            if ended and not mirror.pending:
                return
            time.sleep(POLL_SECONDS)


def deliver_all(outbox: Path, uri: str) -> None:
    """Deliver the whole outbox; where a mirror is at it already, wait until that has.

    Raises ConnectionError where MLflow stays out of reach.
    """
    patient = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passing),
        wait=tenacity.wait_exponential(multiplier=0.5, max=10),
        stop=tenacity.stop_after_delay(SYNC_SECONDS),
    )
    with closing(Outbox(outbox)) as box:
        mirror = Mirror(box, Delivered(outbox, uri), uri)
        while mirror.pending:
            try:
                with _alone(outbox, wait=False):
                    patient(mirror.deliver)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            except tenacity.RetryError as error:
                reason = error.last_attempt.exception()
                raise ConnectionError(f"{uri} was out of reach for {SYNC_SECONDS:g} s: {reason}") from reason


class Mirror:
    """One outbox and one MLflow. Only reads the outbox, so that the service's appends never wait for it."""

    def __init__(self, box: Outbox, delivered: Delivered, uri: str) -> None:
        self._box = box
        self._delivered = delivered
        self._uri = uri
        self._runs: StudyRuns | None = None

    @property
    def pending(self) -> bool:
        """Whether there is something to deliver."""
        return self._box.last()[0] > self._delivered.number

    def deliver(self) -> None:
        """One pass over what was not delivered yet. A refusal of one entry does not hold up the others."""
        for entry in self._box.after(self._delivered.number):
            try:
                self._runs = self._runs or StudyRuns(_client(self._uri), self._box, self._uri)
                self._runs.write(entry)
            except (MlflowException, OSError) as error:
                # What a broken call has done is not known: look the runs up again.
                self._runs = None
                if _passing(error):
                    raise
                log.warning("%s refused %s %s: %s", self._uri, entry.kind, entry.subject, error)
            self._delivered.note(entry.number)


@dataclass
class KnownRun:
    """A run as MLflow has it."""

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
    """The runs of one study in one MLflow, those of earlier deliveries included."""

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
        values = {
            **candidate["metrics"],
            **{f"{name}_stderr": value for name, value in candidate["errors"].items()},
        }
        params = [Param(name, value) for name, value in candidate["params"].items()]
        self._log(run, values, params, _candidate_tags(candidate))
        self._set_status(run, STATUS[candidate["state"]])

    def _write_finish(self, finish: Mapping[str, Any]) -> None:
        front = finish["front"]
        members = {member["id"] for member in front["members"]}
        for candidate, run in self._known.items():
            if run.on_front != (candidate in members):
                run.on_front = candidate in members
                self._client.set_tag(run.id, "pareto", str(run.on_front).lower())
        self._client.log_text(self._parent.id, finish["report"], "front.html")
        self._client.log_dict(self._parent.id, front, "front.json")
        self._client.log_dict(self._parent.id, _table(front), "front_table.json")
        values = {f"candidates_{standing}": float(count) for standing, count in front["candidates"].items()}
        if front["hypervolume"] is not None:
            values["hypervolume"] = front["hypervolume"]
        values |= finish.get("totals", {})  # what an earlier version appended lacks them
        # By the second tag the UI finds the table among the artifacts.
        shown = json.dumps([{"path": "front_table.json", "type": "table"}])
        tags = {"state": "finished", "mlflow.loggedArtifacts": shown, "mlflow.note.content": _note(front)}
        self._log(self._parent, values, [], tags)
        self._set_status(self._parent, "FINISHED")
        self._register(front, finish.get("places", {}))  # what an earlier version appended lacks them

    def _register(self, front: Mapping[str, Any], places: Mapping[str, str]) -> None:
        runs = {member["id"]: self._run(member["id"], member["recipe"]).id for member in front["members"]}
        Registry(self._client, self._experiment, self._outbox_id).show(front, runs, places)

    def _log(
        self, run: KnownRun, values: Mapping[str, float], params: list[Param], tags: Mapping[str, str]
    ) -> None:
        now = int(time.time() * 1000)
        # A value that is there already would become a second point of a curve.
        news = [
            Metric(name, value, now, 0) for name, value in values.items() if run.metrics.get(name) != value
        ]
        self._client.log_batch(run.id, metrics=news, params=params, tags=_tags(tags))
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
        """The candidate's run, made now if an earlier delivery has not."""
        if candidate not in self._known:
            tags = {OUTBOX_TAG: self._outbox_id, CANDIDATE_TAG: candidate}
            if candidate != PARENT:
                tags["mlflow.parentRunId"] = self._parent.id
            run = self._client.create_run(self._experiment, tags=tags, run_name=name[:250])
            self._known[candidate] = KnownRun.of(run)
        return self._known[candidate]

    def _find_runs(self) -> dict[str, KnownRun]:
        found: dict[str, KnownRun] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{OUTBOX_TAG}` = '{self._outbox_id}'", page_token=token
            )
            found |= {run.data.tags[CANDIDATE_TAG]: KnownRun.of(run) for run in page}
            token = page.token
            if not token:
                return found

    def _find_experiment(self, study: str, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(study)
        if experiment is not None:
            return str(experiment.experiment_id)
        # Without a server MLflow would put the files in whatever folder the process runs in.
        file = _file_of(uri)
        location = (file.parent / "mlflow-artifacts" / study).as_uri() if file else None
        # An experiment without a kind opens in the UI's view of chat traces instead of training runs.
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
    if candidate.get("stopped"):  # what an earlier version appended lacks it
        tags["stopped"] = candidate["stopped"]
    if candidate["failure"]:
        tags["failure.kind"] = candidate["failure"]["kind"]
        tags["failure.message"] = candidate["failure"]["message"]
    return tags


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value[:MAX_TEXT]) for name, value in tags.items()]


def _table(front: Mapping[str, Any]) -> dict[str, Any]:
    """The front in the form of MLflow's logged tables."""
    names = [objective["metric"] for objective in front["objectives"]]
    rows = [
        [member["id"], member["recipe"], *(member["metrics"][name] for name in names)]
        for member in front["members"]
    ]
    return {"columns": ["candidate", "recipe", *names], "data": rows}


def _note(front: Mapping[str, Any]) -> str:
    """The front as the run's description, in Markdown."""
    table = _table(front)
    lines = [table["columns"], ["---"] * len(table["columns"])]
    lines += [[f"{cell:,.6g}" if isinstance(cell, float) else cell for cell in row] for row in table["data"]]
    text = f"{len(front['members'])} models on the front, smallest first.\n\n"
    for line in lines:
        row = "| " + " | ".join(line) + " |\n"
        if len(text) + len(row) > MAX_TEXT:
            break
        text += row
    return text


def _client(uri: str) -> MlflowClient:
    file = _file_of(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    # A new database is announced in a dozen lines, table by table.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def _file_of(uri: str) -> Path | None:
    """The database's file where MLflow needs no server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _passing(error: BaseException) -> bool:
    """Whether the same call may go well later: the server is away, busy, or the connection broke, or it does not let us
    in, which its owner or another password may change."""
    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status >= 500 or status in (401, 403, 429)
    return isinstance(error, OSError)


@contextmanager
def _alone(outbox: Path, wait: bool = True) -> Iterator[None]:
    """One delivery of an outbox at a time, or two would both make the run that neither found.

    The lock goes with the process that holds it. Raises BlockingIOError where another has it and `wait`
    is false.
    """
    with outbox.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
