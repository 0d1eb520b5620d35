"""Keep status.json and front.json up to date while a study runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from orchestrator.pareto.front import Objective
from orchestrator.persistence.atomic_files import write_json
from orchestrator.persistence.front_file import write_front
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service.cost_meter import CostMeter
from orchestrator.service.status import Status, ended_of, status_of
from orchestrator.study.budget import lines, summary
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import Results, Standings, front_snapshot
from orchestrator.study.study import Study

WRITE_SECONDS = 1.0
"""The shortest time between two writes of status and front: a person needs nothing newer."""
_PAUSE_PER_WRITE = 50
"""The next pause lasts this many times the last write, so that many candidates cost at most a fiftieth of the time."""

Show = Callable[[Status], None]


class StudyMonitor:
    """Writes status.json and front.json, and shows the status, at most once a second."""

    def __init__(self, prepared: PreparedStudy, study: Study, show: Show, meter: CostMeter) -> None:
        self._prepared = prepared
        self._show = show
        self._meter = meter
        self._began = time.time()
        self._ended_before = ended_of(study)
        self._written, self._pause = 0.0, 0.0
        self._standings = standings_of(prepared, study)
        self._results: Results | None = None

    def record(self, candidate: Candidate) -> None:
        self._standings.take(candidate.id)
        self._results = None

    def turn(self, study: Study) -> None:
        if time.time() - self._written >= self._pause:
            self.write(study)

    def write(self, study: Study) -> None:
        """Write both files and show the status. Called regularly, and at the end."""
        began = time.time()
        criteria = self._standings.objectives, self._standings.fidelity
        if criteria != (_objectives(self._prepared, study), _fidelity(study)):
            self._standings = standings_of(self._prepared, study)
            self._results = None
        if study.original.measurement is not None and self._results is None:
            self._results = self._standings.results()
            write_front(self._prepared.folder.front, front_snapshot(self._results))
        status = self._status(study)
        write_json(self._prepared.folder.status, dataclasses.asdict(status))
        self._show(status)
        self._written = time.time()
        self._pause = max(WRITE_SECONDS, _PAUSE_PER_WRITE * (self._written - began))

    def _status(self, study: Study) -> Status:
        name = self._prepared.config.name
        status = status_of(name, study, self._results, self._began, self._ended_before)
        bill, budget = self._meter.bill, self._meter.budget
        return dataclasses.replace(
            status,
            node_hours=bill.node_hours,
            cost=bill.money,
            currency=bill.currency,
            spent=summary(bill, budget),
            bill=lines(bill, budget),
        )


def standings_of(prepared: PreparedStudy, study: Study) -> Standings:
    objectives = _objectives(prepared, study)
    return Standings(prepared.config.name, objectives, study.original.id, study.candidates, _fidelity(study))


def _objectives(prepared: PreparedStudy, study: Study) -> list[Objective]:
    """The objectives by which candidates are compared now. While the search runs, nothing is timed yet and
    timed objectives do not count."""
    plan = prepared.plan
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    if untimed and study.stage in ("searching", "racing"):
        return untimed
    return list(plan.objectives)


def _fidelity(study: Study) -> float:
    """The smallest share of the evaluation that counts now. While the search runs, any share counts."""
    if study.stage in ("searching", "racing"):
        return 0.0
    return 1.0
