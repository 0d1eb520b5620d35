"""Keep status.json, front.json and the report up to date while a study runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from orchestrator.pareto.front import Objective
from orchestrator.persistence.front_file import write_front
from orchestrator.planning.prepare import Prepared
from orchestrator.service.cost_meter import CostMeter
from orchestrator.service.status import Status, ended_of, status_of, write_status
from orchestrator.study.budget import lines, summary
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import Results, Standings, front_snapshot
from orchestrator.study.study import Study

WRITE_SECONDS = 1.0
"""How often status and front are written, at most: what a person reads need not be newer. Where there are very
many candidates it is done more seldom, so that it takes no more than a fiftieth of the time."""

Show = Callable[[Status], None]


class StudyMonitor:
    """Writes status.json and front.json and shows progress, no oftener than people can read."""

    def __init__(self, prepared: Prepared, study: Study, show: Show, account: CostMeter) -> None:
        self._prepared = prepared
        self._show = show
        self._account = account
        self._began = time.time()
        self._ended_before = ended_of(study)
        self._written, self._pause = 0.0, 0.0
        self._standings = standings_json(prepared, study)
        self._results: Results | None = None

    def record(self, candidate: Candidate) -> None:
        self._standings.take(candidate.id)
        self._results = None

    def turn(self, study: Study) -> None:
        if time.time() - self._written >= self._pause:
            self.write(study)

    def write(self, study: Study) -> None:
        """Bring the files up to date; called now and then, and at the very end."""
        began = time.time()
        folder = self._prepared.folder
        judged_by = self._standings.objectives, self._standings.fidelity
        if judged_by != (_objectives(self._prepared, study), _fidelity(study)):
            self._standings = standings_json(self._prepared, study)
            self._results = None
        if study.original.measurement is not None and self._results is None:
            self._results = self._standings.results()
            write_front(folder / "front.json", front_snapshot(self._results))
        status = self._status(study)
        write_status(folder, status)
        self._show(status)
        self._written = time.time()
        self._pause = max(WRITE_SECONDS, 50 * (self._written - began))

    def _status(self, study: Study) -> Status:
        name = self._prepared.config.name
        found = status_of(name, study, self._results, self._began, self._ended_before)
        bill, budget = self._account.bill, self._account.budget
        return dataclasses.replace(
            found,
            node_hours=bill.node_hours,
            cost=bill.money,
            currency=bill.currency,
            spent=summary(bill, budget),
            bill=lines(bill, budget),
        )


def standings_json(prepared: Prepared, study: Study) -> Standings:
    objectives = _objectives(prepared, study)
    return Standings(prepared.config.name, objectives, study.original.id, study.candidates, _fidelity(study))


def _objectives(prepared: Prepared, study: Study) -> list[Objective]:
    """What results are judged by now. While the search goes on nothing is timed yet: by the other objectives."""
    plan = prepared.plan
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    return untimed if untimed and study.stage in ("searching", "racing") else list(plan.objectives)


def _fidelity(study: Study) -> float:
    """The share of the evaluation that counts at least: while the search goes on, whatever there is."""
    return 0.0 if study.stage in ("searching", "racing") else 1.0
