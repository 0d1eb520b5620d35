"""Launch: put a prepared study together with its executor, store, ledger and tracker, run it, write what came out."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from types import FrameType

from cluster.executors.executor import Executor
from cluster.on_ray.executor import RayExecutor
from cluster.storage.open import artifact_url, is_remote, open_store, prepare_store
from jobs.measure import environment
from orchestrator import search
from orchestrator.persistence.atomic_files import write_json, write_whole
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.lock import only_one
from orchestrator.persistence.study_folder import CACHE, CHECKPOINTS, MATERIALS, SCRATCH, home, note_store
from orchestrator.planning.job_resources import slots_of
from orchestrator.planning.prepare import FIRST_RUNG_BEFORE, Prepared, rungs_of
from orchestrator.publishing.report import report_html
from orchestrator.service.cost_meter import CostMeter
from orchestrator.service.fit_predictors import fit_predictors
from orchestrator.service.loop import Service, Work, replay
from orchestrator.service.monitor import Show, StudyMonitor, standings_json
from orchestrator.study.budget import lines
from orchestrator.study.results import Results
from orchestrator.study.study import Study
from orchestrator.tracking import MLflowTracker, NoTracker, Tracker
from orchestrator.worker import checkpoint_sync
from orchestrator.worker.watchdog import STALL_SECONDS
from orchestrator.worker.work import WorkerContext, work


class OtherStudyError(ValueError):
    """The study's folder holds another study of the same name."""


def launch(
    prepared: Prepared,
    show: Show,
    overrides: tuple[str, ...] = (),
    executor: Executor | None = None,
    do: Work | None = None,
) -> Results:
    """Run the study to its end, or on from where it was left; returns what it found.

    executor and do are Ray on this machine and the real work, unless a test gives others.
    Raises OtherStudy, and BlockingIOError where another process runs this study.
    """
    folder = prepared.folder
    with only_one(folder):
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # what a killed process left half done
        ledger = Ledger(folder / "ledger.db")
        _claim(ledger, prepared, overrides)
        prepare_store(prepared.config.store)
        tracker = _tracker(prepared)
        tracker.start(
            prepared.config.name,
            prepared.text,
            environment(prepared.materials.target),
            prepared.plan.objectives,
        )
        cluster = prepared.config.cluster
        # How many a cluster has its Ray knows; this machine is only one of it.
        slots = None if cluster.address and cluster.slots == "auto" else slots_of(prepared.config)
        leases = {} if cluster.stall_seconds is None else {STALL_SECONDS: str(cluster.stall_seconds)}
        running = executor or RayExecutor(
            slots,
            cluster.memory_gib,
            address=cluster.address,
            env=leases,
            start_seconds=cluster.start_seconds,
        )
        with closing(ledger), closing(running), _interruptible():
            account = CostMeter(ledger, running, prepared.budget, cluster.price_per_hour)
            prepared = fit_predictors(_as_begun(prepared, ledger), ledger, running)
            study = Study(prepared.plan)
            searching = search.make(
                prepared.config.search.algorithm,
                prepared.space.knobs(),
                prepared.plan.objectives,
                lambda choices: prepared.known(choices, study),
                prepared.config.search.seed,
                prepared.opening(),
            )
            replay(study, ledger, searching)
            watch = StudyMonitor(prepared, study, show, account)
            work_on = do or _work(prepared)
            try:
                Service(study, prepared, searching, running, ledger, tracker, work_on, watch, account).run()
            finally:
                account.settle()
                watch.write(study)
        for left in (CHECKPOINTS, SCRATCH):  # of work that was given up
            shutil.rmtree(folder / left, ignore_errors=True)
        _forget_trainings(prepared, study)
        results = standings_json(prepared, study).results()
        said = [*lines(account.bill, account.budget), *_ended_by_budget(study)]
        page = report_html(results, prepared.text, study.savings, said)
        write_whole(folder / "report.html", page)
        tracker.finish(results, page, account.bill.totals)
        return results


def _ended_by_budget(study: Study) -> list[str]:
    """What the budget kept from being done, in words."""
    if study.granted.reason is None:
        return []
    short = [
        (study.allowed - study.proposed, "candidates were not tried"),
        (study.waiting, "of those proposed were not measured"),
        (study.untimed, "that may be on the front were not timed"),
    ]
    counts = ", ".join(f"{count} {what}" for count, what in short if count)
    return [f"It ended early: {study.granted.reason}{f'; {counts}' if counts else ''}."]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end a study as Ctrl-C does. Ray takes the signal when it starts, so this comes after it."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(ledger: Ledger, prepared: Prepared, overrides: tuple[str, ...]) -> None:
    """Make sure that the folder is new or holds this very study, and note down how to resume it."""
    held = ledger.noted("digest")
    if held is not None and held != prepared.digest:
        raise OtherStudyError(
            f"{prepared.folder} holds a study with another model, data, space or objectives; give this one "
            f"another name (name=…), or remove that folder"
        )
    ledger.note("digest", prepared.digest)
    ledger.note("overrides", json.dumps(overrides))
    write_whole(prepared.folder / "study.yaml", prepared.text)
    note_store(prepared.folder, prepared.config.store)
    write_json(prepared.folder / MATERIALS, dataclasses.asdict(prepared.materials))


def _as_begun(prepared: Prepared, ledger: Ledger) -> Prepared:
    """With the rungs that the study began with, if it does not name its own: they are part of its jobs' names."""
    if prepared.config.search.rungs != "auto":
        return prepared
    noted = ledger.noted("rungs")
    if noted is None:
        rungs, plan = prepared.plan.rungs, prepared.plan
        if next(ledger.events(), None) is not None:
            names = (*plan.meters, *plan.timers)
            rungs = rungs_of(prepared.config, prepared.materials, names, FIRST_RUNG_BEFORE)
        noted = json.dumps(rungs)
        ledger.note("rungs", noted)
    return dataclasses.replace(
        prepared, plan=dataclasses.replace(prepared.plan, rungs=tuple(json.loads(noted)))
    )


def _work(prepared: Prepared) -> Work:
    store, here = prepared.config.store, home(prepared.config.store).resolve()
    scratch = here / prepared.config.name / SCRATCH
    address = store if is_remote(store) else str(here)
    place = WorkerContext(prepared.materials, address, scratch, here / CACHE, prepared.sharing)
    return functools.partial(work, workplace=place)


def _forget_trainings(prepared: Prepared, study: Study) -> None:
    """Remove the checkpoints that workers left in a store that is elsewhere: of work that was given up."""
    if is_remote(prepared.config.store):
        lineages = [candidate.recipe.lineage() for candidate in study.candidates.values()]
        with suppress(OSError):
            made = {step.id for lineage in lineages for step in lineage}
            checkpoint_sync.drop(made, open_store(prepared.config.store))


def _tracker(prepared: Prepared) -> Tracker:
    uri = prepared.config.tracking.uri
    if uri == "none":
        return NoTracker()
    default = f"sqlite:///{home(prepared.config.store).resolve() / 'mlflow.db'}"
    store = prepared.config.store
    held = store if is_remote(store) else str(home(store).resolve())
    return MLflowTracker(uri or default, prepared.folder / "outbox.db", functools.partial(artifact_url, held))
