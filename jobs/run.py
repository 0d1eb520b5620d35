"""Run: how one job is done on a worker. Knows files and torch; nothing of stores, queues or other machines."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs import data
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.failures import failure
from jobs.job import Failure, Job
from jobs.materials import Materials, TextSource
from jobs.measure import environment, measure
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import Subject
from jobs.models import loading, memory, placement, sources
from jobs.models.model import Model
from jobs.parallel import Sharing
from jobs.progress import JobInterruptedError, Report
from jobs.recipe import Recipe
from jobs.technique import Technique
from jobs.training import ranks

_HEADER_BYTES = 4096
"""By so much may the header of a file be longer than foretold, where the data decide what each layer gets."""


@dataclass(frozen=True)
class JobOutput:
    """A job that went well. built: whether the artifact was made now, and lies in the job's folder;
    seconds: how long making it took; spared_seconds: and would have taken more without statistics that were there."""

    measurement: Measurement
    seconds: float
    saved_seconds: float
    built: bool


@dataclass(frozen=True)
class JobDirs:
    """The folders that a job may write in, and how it is shared out: as `attempt` was told."""

    folder: Path
    cache: Path
    checkpoints: Path | None = None
    sharing: Sharing = field(default_factory=Sharing)


def attempt(
    job: Job,
    materials: Materials,
    parent: Path | None,
    built: Path | None,
    folder: Path,
    cache: Path,
    report: Report,
    checkpoints: Path | None = None,
    before: Measurement | None = None,
    sharing: Sharing | None = None,
) -> JobOutput | Failure | None:
    """Make the artifact of `job.recipe` in `folder` (new or empty) and measure it.

    parent: the folder of the parent's artifact; None for the original, which has no parent.
    built: the folder of the artifact where it was made before; it is then only measured.
    cache: where statistics that jobs share are kept.
    checkpoints: where a training leaves what another attempt at this recipe goes on from; the caller
        removes it when none will come.
    before: what `job.before` found of `built`: its items are not read again, if it was measured in this environment.
    sharing: how a training is spread over the ranks that make this attempt together.
    Never raises: what goes wrong comes back as a Failure.

    Of several ranks (`jobs.training.ranks`) all make the model; the first alone writes and measures it. The
    others return None when their part is done, or all were interrupted together: the first tells.
    """
    places = JobDirs(folder, cache, checkpoints, sharing or Sharing())
    try:
        ranks.take_device()
        _prepare_process(materials.model)
        if not ranks.here().first:
            if built is None:
                _made(job, materials, parent, places, report)
            return None
        return _attempt(job, materials, parent, built, places, report, before)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        if isinstance(error, JobInterruptedError) and error.together and not ranks.here().first:
            return None
        return failure(error)
    finally:
        memory.release()  # here the frames that held the model are gone


@functools.cache
def _prepare_process(model: str) -> None:
    """Import what the original's family needs before all that is imported is set aside: else each collection walks
    that again, 0.1 s."""
    loading.original_layout(sources.locate(model))
    memory.freeze_libraries()


def _attempt(
    job: Job,
    materials: Materials,
    parent: Path | None,
    built: Path | None,
    places: JobDirs,
    report: Report,
    before: Measurement | None,
) -> JobOutput:
    started = time.perf_counter()
    spared = _make(job, materials, parent, places, report) if built is None else 0.0
    seconds = time.perf_counter() - started
    report(1.0, "measuring")
    original = sources.locate(materials.model)
    if before is not None and before.environment != environment(materials.target):
        before = None
    subject = Subject(
        built or places.folder,
        original,
        materials,
        job.fidelity,
        places.folder.parent,
        places.cache,
        before,
        report,
    )
    return JobOutput(measure(job.meters, subject), seconds, spared, built is None)


def _make(job: Job, materials: Materials, parent: Path | None, places: JobDirs, report: Report) -> float:
    """Write the artifact of a job's recipe, the original's or one step from its parent's, into its folder; the seconds
    that statistics spared it."""
    model, notes, spared = _made(job, materials, parent, places, report)
    about = {"recipe": job.recipe.to_dict(), "text": str(job.recipe), "notes": notes}
    loading.save(model, places.folder, about)
    return spared


def _made(
    job: Job, materials: Materials, parent: Path | None, places: JobDirs, report: Report
) -> tuple[Model, list[dict[str, Any]], float]:
    """The model of a job's recipe, what is noted of its making, and the seconds that statistics spared it."""
    recipe = job.recipe
    if recipe.parent is None:
        report(0.0, "writing the original")
        return loading.load(sources.locate(materials.model)), [], 0.0
    if parent is None:
        raise LookupError(f"the artifact of {recipe.parent} is needed to make {recipe}, and was not given")
    step = recipe.steps[-1]
    report(0.0, str(step))
    context = context_of(recipe, materials, places, report)
    model = _compressed(loading.load(parent, device()), step, context)
    notes = loading.read_provenance(parent).get("notes", [])
    if context.notes:
        notes = [*notes, {"step": str(step), **context.notes}]
    return model, notes, context.statistics.saved_seconds


def _compressed(model: Model, step: Technique, context: Context) -> Model:
    """The model after `step`; refuses one that is not what the step's outline foretold, or not finite."""
    expected = step.output_layout(model.layout())
    model = step.compress(model, context)
    left = model.layout()
    if step.exact and left != expected:
        raise RuntimeError(f"{step} left a model of another layout than its outline foretold")
    if left.size_bytes() > expected.size_bytes() + _HEADER_BYTES:
        raise RuntimeError(
            f"{step} left a model of {left.size_bytes()} bytes, its outline foretold {expected.size_bytes()}"
        )
    for name, tensor in model.module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"{step} left NaN or infinite values in {name}")
    return model


def context_of(recipe: Recipe, materials: Materials, places: JobDirs, report: Report) -> Context:
    """The context of the recipe's last step, with what it needs and no more: reading text that nobody asks for costs
    seconds."""
    original = sources.locate(materials.model)
    step, parent = recipe.steps[-1], recipe.lineage()[-2]

    def rows(source: TextSource | None) -> Tensor | None:
        return None if source is None else data.windows_for(source, original)

    return Context(
        statistics=Statistics(places.cache, parent.id),
        workdir=places.folder.parent,
        seed=recipe.origin.seed,
        calibration=rows(materials.calibration) if step.needs & {"calibration", "gradients"} else None,
        training=rows(materials.training) if "training" in step.needs else None,
        teacher=lambda: placement.move_all(loading.load(original, device())),
        teacher_statistics=Statistics(places.cache, recipe.lineage()[0].id),
        checkpoints=places.checkpoints,
        sharing=places.sharing,
        report=report,
    )


def device() -> str:
    """What jobs compute on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"
