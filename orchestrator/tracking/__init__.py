"""Mirror studies to MLflow. The service never waits for MLflow and never reads from it.

    service ──append──▶ outbox (a file) ──▶ mirror (a separate process) ──▶ MLflow

Only mlflow_mirror.py and registry.py import MLflow; the service does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import Results, errors, front_snapshot, metrics, prediction_errors
from orchestrator.tracking.outbox import Outbox


class Tracker(Protocol):
    """Receives the events of a study. No call waits for a network or fails because of one."""

    def start(
        self, study: str, yaml: str, environment: Mapping[str, str], objectives: Sequence[Objective]
    ) -> None:
        """Start or resume the study. Called before all other methods."""
        ...

    def record(self, candidate: Candidate) -> None:
        """Record the present state of a candidate; called again after each change."""
        ...

    def finish(self, results: Results, report_html: str, totals: Mapping[str, float] | None = None) -> None:
        """Finish the study. Delivery of recorded candidates may continue after this returns.

        totals: metrics of the whole study, such as its node-hours.
        """
        ...


class NoTracker:
    """Ignores all events, for studies without tracking."""

    def start(
        self, study: str, yaml: str, environment: Mapping[str, str], objectives: Sequence[Objective]
    ) -> None:
        pass

    def record(self, candidate: Candidate) -> None:
        pass

    def finish(self, results: Results, report_html: str, totals: Mapping[str, float] | None = None) -> None:
        pass


class MLflowTracker:
    """Appends events to an outbox, which a process of low priority delivers to MLflow.

    uri: `sqlite:///…`, or the address of an MLflow server. The same outbox continues the same parent run.
    artifact_url: returns the location of an artifact in the store by its digest. Models in MLflow hold this location
    in place of weights.
    """

    def __init__(self, uri: str, outbox: Path, artifact_url: Callable[[str], str] = str) -> None:
        self._uri = uri
        self._artifact_url = artifact_url
        self._file = outbox
        self._outbox = Outbox(outbox)
        self._mirror: subprocess.Popen[bytes] | None = None

    def start(
        self, study: str, yaml: str, environment: Mapping[str, str], objectives: Sequence[Objective]
    ) -> None:
        self._outbox.append(
            "start",
            {
                "study": study,
                "yaml": yaml,
                "environment": dict(environment),
                "objectives": [asdict(objective) for objective in objectives],
            },
        )
        self._ensure_mirror()

    def record(self, candidate: Candidate) -> None:
        self._outbox.append("candidate", candidate_entry(candidate), candidate.id)

    def finish(self, results: Results, report_html: str, totals: Mapping[str, float] | None = None) -> None:
        front = front_snapshot(results)
        urls = {
            member.id: self._artifact_url(member.artifact)
            for member in front.members
            if member.artifact is not None
        }
        content = {
            "front": front.to_dict(),
            "report": report_html,
            "places": urls,
            "totals": dict(totals or {}),
        }
        self._outbox.append("finish", content)
        self._ensure_mirror()

    def _ensure_mirror(self) -> None:
        if self._mirror is not None and self._mirror.poll() is None:
            return
        with self._file.with_suffix(".log").open("ab") as log:
            self._mirror = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.tracking", str(self._file), self._uri, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C must end the service without its mirror, which still has entries to deliver.
                start_new_session=True,
            )
        # No code waits for the mirror, but an ended child must be reaped.
        threading.Thread(target=self._mirror.wait, daemon=True).start()


def candidate_entry(candidate: Candidate) -> dict[str, Any]:
    """The state of a candidate as plain data for MLflow."""
    values = dict(metrics(candidate))
    for metric, error in prediction_errors(candidate).items():
        values[f"{metric}_predicted_error"] = error
    entry: dict[str, Any] = {
        "id": candidate.id,
        "recipe": str(candidate.recipe),
        "state": candidate.state,
        "artifact": candidate.artifact,
        "attempts": candidate.attempts,
        "params": options(candidate),
        "metrics": values,
        "errors": dict(errors(candidate)),
        "unreliable": [],
        "environment": {},
        "seconds": None,
        "stopped": candidate.stopped,
        "failure": None,
    }
    measurement, failure = candidate.measurement, candidate.failure
    if measurement is not None:
        entry["unreliable"] = list(measurement.unreliable)
        entry["environment"] = dict(measurement.environment)
        entry["seconds"] = measurement.seconds
    if failure is not None:
        entry["failure"] = {"kind": failure.kind, "message": failure.message}
    return entry


def options(candidate: Candidate) -> dict[str, str]:
    """All options of the recipe by flat name, such as `svd_llm.keep`.

    The names of a technique's second step have a number: `gptq_2.bits`.
    """
    flat: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for step in candidate.recipe.steps:
        name, prefix = step.name(), step.name()
        counts[name] += 1
        if counts[name] > 1:
            prefix = f"{name}_{counts[name]}"
        flat |= {f"{prefix}.{option}": str(value) for option, value in step.options().items()}
    return flat


def sync(outbox: Path, uri: str) -> None:
    """Deliver the whole outbox now. Returns when MLflow has it; raises ConnectionError after a long outage."""
    from orchestrator.tracking.mlflow_mirror import deliver_all  # imports MLflow, which takes seconds

    deliver_all(outbox, uri)
