"""Tracking: a study as others see it in MLflow. A mirror: the study never waits for it and never reads it.

    service ──append──▶ outbox (a file) ──▶ mirror (a process of its own) ──▶ MLflow

The service imports no MLflow: only `mirror.py` and `registry.py` do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import Results, errors, front_json, metrics, prediction_errors
from orchestrator.tracking.outbox import Outbox


class Tracker(Protocol):
    """Told what happens in a study. No call waits for a network, and none fails because of one."""

    def start(
        self, study: str, yaml: str, environment: Mapping[str, str], objectives: Sequence[Objective]
    ) -> None:
        """The study begins, or goes on after an interruption. Before anything else."""
        ...

    def record(self, candidate: Candidate) -> None:
        """What is known of a candidate now; may come again whenever more is known."""
        ...

    def finish(self, results: Results, report_html: str, totals: Mapping[str, float] | None = None) -> None:
        """The study is over; totals: what it took in all. What `record` was told goes on being delivered after this
        returns."""
        ...


class NoTracker:
    """For studies that nobody tracks."""

    def start(
        self, study: str, yaml: str, environment: Mapping[str, str], objectives: Sequence[Objective]
    ) -> None:
        pass

    def record(self, candidate: Candidate) -> None:
        pass

    def finish(self, results: Results, report_html: str, totals: Mapping[str, float] | None = None) -> None:
        pass


class MLflowTracker:
    """Appends to an outbox beside the study; a process of low priority carries it to MLflow.

    uri: `sqlite:///…`, or an MLflow server's address. The same outbox continues the same parent run.
    place: where the store keeps an artifact, by its digest: what MLflow's models say instead of holding weights.
    """

    def __init__(self, uri: str, outbox: Path, place: Callable[[str], str] = str) -> None:
        self._uri = uri
        self._place = place
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
        front = front_json(results)
        held = {one["id"]: one["artifact"] for one in front["members"] if one["artifact"]}
        places = {id: self._place(digest) for id, digest in held.items()}
        told = {"front": front, "report": report_html, "places": places, "totals": dict(totals or {})}
        self._outbox.append("finish", told)
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
                # Ctrl-C ends the service, not the delivery of what it recorded.
                start_new_session=True,
            )
        # Nobody waits for the mirror, but a child that ended must be reaped.
        threading.Thread(target=self._mirror.wait, daemon=True).start()


def candidate_entry(candidate: Candidate) -> dict[str, Any]:
    """What MLflow shows of a candidate, as plain data."""
    failure = candidate.failure
    off = {f"{metric}_predicted_error": error for metric, error in prediction_errors(candidate).items()}
    return {
        "id": candidate.id,
        "recipe": str(candidate.recipe),
        "state": candidate.state,
        "artifact": candidate.artifact,
        "attempts": candidate.attempts,
        "params": options(candidate),
        "metrics": {**metrics(candidate), **off},
        "errors": dict(errors(candidate)),
        "unreliable": list(candidate.measurement.unreliable) if candidate.measurement else [],
        "environment": dict(candidate.measurement.environment) if candidate.measurement else {},
        "seconds": candidate.measurement.seconds if candidate.measurement else None,
        "stopped": candidate.stopped,
        "failure": {"kind": failure.kind, "message": failure.message} if failure else None,
    }


def options(candidate: Candidate) -> dict[str, str]:
    """Every option by its flat name, `svd_llm.keep`; a technique's second step counts, `gptq_2.bits`."""
    found: dict[str, str] = {}
    names: list[str] = []
    for step in candidate.recipe.steps:
        names.append(step.name())
        count = names.count(step.name())
        prefix = step.name() if count == 1 else f"{step.name()}_{count}"
        found |= {f"{prefix}.{name}": str(value) for name, value in step.options().items()}
    return found


def sync(outbox: Path, uri: str) -> None:
    """Deliver all that the outbox holds, now. Returns once MLflow has it; an outage raises after a while."""
    from orchestrator.tracking.mlflow_mirror import deliver_all  # this alone takes MLflow's seconds to import

    deliver_all(outbox, uri)
