"""Launch a prepared study: connect it to its executor, store, ledger and tracker, run it, and publish its results."""

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
from orchestrator.persistence.study_folder import StudyFolder, home
from orchestrator.planning.candidates import KnownMetrics
from orchestrator.planning.cost import CostModel
from orchestrator.planning.initial_design import initial_design
from orchestrator.planning.job_resources import local_slots, sharing_of
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.planning.study_meters import FIRST_RUNG_OF_OLD_STUDIES, rungs_of
from orchestrator.publishing.report import report_html
from orchestrator.service.cost_meter import CostMeter
from orchestrator.service.fit_predictors import fit_predictors
from orchestrator.service.loop import Service, Work, replay
from orchestrator.service.monitor import Show, StudyMonitor, standings_of
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
    prepared: PreparedStudy,
    show: Show,
    overrides: tuple[str, ...] = (),
    executor: Executor | None = None,
    do: Work | None = None,
) -> Results:
    """Run a study to its end, from its beginning or from the point at which an earlier process stopped.

    executor and do: Ray and the real work by default; tests pass others.
    Raises OtherStudyError, and BlockingIOError if another process runs this study.
    """
    with only_one(prepared.folder.path):
        ledger = _claim_folder(prepared, overrides)
        prepare_store(prepared.config.store)
        tracker = _start_tracking(prepared)
        executor = executor or _start_ray(prepared)
        with closing(ledger), closing(executor), _sigterm_interrupts():
            meter = CostMeter(ledger, executor, prepared.budget, prepared.config.cluster.price_per_hour)
            prepared = _restore_rungs(prepared, ledger)
            prepared = fit_predictors(prepared, ledger, executor)
            service, monitor = _assemble(
                prepared, ledger, executor, tracker, show, meter, do or _work(prepared)
            )
            try:
                service.run()
            finally:
                meter.settle()
                monitor.write(service.study)
        _remove_abandoned_work(prepared, service.study)
        return _publish(prepared, service.study, meter, tracker)


def _claim_folder(prepared: PreparedStudy, overrides: tuple[str, ...]) -> Ledger:
    """Open the ledger of a folder that is new or holds this very study, and write the files from which it resumes."""
    folder = prepared.folder
    shutil.rmtree(folder.scratch, ignore_errors=True)  # unfinished files of a killed process
    ledger = Ledger(folder.ledger)
    claimed = ledger.noted("digest")
    if claimed is not None and claimed != prepared.digest:
        raise OtherStudyError(
            f"{folder} holds a study with another model, data, space or objectives; give this one "
            f"another name (name=…), or remove that folder"
        )
    ledger.note("digest", prepared.digest)
    ledger.note("overrides", json.dumps(overrides))
    write_whole(folder.study_file, prepared.text)
    folder.note_store(prepared.config.store)
    write_json(folder.materials, dataclasses.asdict(prepared.materials))
    return ledger


def _assemble(
    prepared: PreparedStudy,
    ledger: Ledger,
    executor: Executor,
    tracker: Tracker,
    show: Show,
    meter: CostMeter,
    do: Work,
) -> tuple[Service, StudyMonitor]:
    """Return the loop of a study in the state that its ledger describes, and the monitor that it calls."""
    study = Study(prepared.plan)
    costs = CostModel.of(prepared)
    searching = search.make(
        prepared.config.search.algorithm,
        prepared.space.knobs(),
        prepared.plan.objectives,
        KnownMetrics(prepared, costs, study),
        prepared.config.search.seed,
        initial_design(prepared, KnownMetrics(prepared, costs)),
    )
    replay(study, ledger, searching)
    monitor = StudyMonitor(prepared, study, show, meter)
    service = Service(study, prepared, costs, searching, executor, ledger, tracker, do, monitor, meter)
    return service, monitor


def _start_tracking(prepared: PreparedStudy) -> Tracker:
    config = prepared.config
    tracker: Tracker = NoTracker()
    if config.tracking.uri != "none":
        uri = config.tracking.uri or f"sqlite:///{prepared.folder.tracking_database}"
        url_of = functools.partial(artifact_url, _store_address(prepared))
        tracker = MLflowTracker(uri, prepared.folder.outbox, url_of)
    tracker.start(
        config.name, prepared.text, environment(prepared.materials.target), prepared.plan.objectives
    )
    return tracker


def _start_ray(prepared: PreparedStudy) -> Executor:
    cluster = prepared.config.cluster
    # Ray knows the slots of a cluster; this machine is only one of its nodes.
    slots = None if cluster.address and cluster.slots == "auto" else local_slots(prepared.config)
    environment_variables = {}
    if cluster.stall_seconds is not None:
        environment_variables[STALL_SECONDS] = str(cluster.stall_seconds)
    return RayExecutor(
        slots,
        cluster.memory_gib,
        address=cluster.address,
        env=environment_variables,
        start_seconds=cluster.start_seconds,
    )


def _restore_rungs(prepared: PreparedStudy, ledger: Ledger) -> PreparedStudy:
    """The study with the rungs with which it began, unless its file states rungs: they are a part of its job ids."""
    if prepared.config.search.rungs != "auto":
        return prepared
    noted = ledger.noted("rungs")
    if noted is None:
        plan, rungs = prepared.plan, prepared.plan.rungs
        began_earlier = next(ledger.events(), None) is not None
        if began_earlier:
            names = (*plan.meters, *plan.timers)
            rungs = rungs_of(prepared.config, prepared.materials, names, FIRST_RUNG_OF_OLD_STUDIES)
        noted = json.dumps(rungs)
        ledger.note("rungs", noted)
    plan = dataclasses.replace(prepared.plan, rungs=tuple(json.loads(noted)))
    return dataclasses.replace(prepared, plan=plan)


def _work(prepared: PreparedStudy) -> Work:
    folder = StudyFolder(home(prepared.config.store).resolve() / prepared.config.name)
    context = WorkerContext(
        prepared.materials,
        _store_address(prepared),
        folder.scratch,
        folder.cache,
        sharing_of(prepared.config.cluster),
    )
    return functools.partial(work, context=context)


def _store_address(prepared: PreparedStudy) -> str:
    """The address of the study's store, which holds in any working directory."""
    store = prepared.config.store
    return store if is_remote(store) else str(home(store).resolve())


def _remove_abandoned_work(prepared: PreparedStudy, study: Study) -> None:
    """Remove scratch files and checkpoints of work that was given up, on this machine and in a remote store."""
    for folder in (prepared.folder.checkpoints, prepared.folder.scratch):
        shutil.rmtree(folder, ignore_errors=True)
    if not is_remote(prepared.config.store):
        return
    recipe_ids: set[str] = set()
    for candidate in study.candidates.values():
        recipe_ids.update(step.id for step in candidate.recipe.lineage())
    with suppress(OSError):
        checkpoint_sync.drop(recipe_ids, open_store(prepared.config.store))


def _publish(prepared: PreparedStudy, study: Study, meter: CostMeter, tracker: Tracker) -> Results:
    """Write the report, and send the results to the tracker."""
    results = standings_of(prepared, study).results()
    remarks = [*lines(meter.bill, meter.budget), *_effects_of_budget(study)]
    page = report_html(results, prepared.text, study.savings, remarks)
    write_whole(prepared.folder.report, page)
    tracker.finish(results, page, meter.bill.totals)
    return results


def _effects_of_budget(study: Study) -> list[str]:
    """A sentence on the work that was not done because the budget was used up; none if it was not."""
    if study.granted.reason is None:
        return []
    counts = []
    for count, description in (
        (study.allowed - study.proposed, "candidates were not tried"),
        (study.waiting, "of those proposed were not measured"),
        (study.untimed, "that may be on the front were not timed"),
    ):
        if count:
            counts.append(f"{count} {description}")
    details = f"; {', '.join(counts)}" if counts else ""
    return [f"It ended early: {study.granted.reason}{details}."]


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a study as Ctrl-C does. Ray sets its own handler when it starts, so this comes later."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
