"""Run one job on a worker: make the model, then measure it. Uses files and torch, and no store or cluster."""

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
from jobs.measurement.meter import ShippedModel
from jobs.models import loading, memory, placement, sources
from jobs.models.model import Model
from jobs.parallel import Sharing
from jobs.progress import JobInterruptedError, Report
from jobs.recipe import Recipe
from jobs.technique import Technique
from jobs.training import ranks

_HEADER_BYTES = 4096
"""The header of a file may exceed its prediction by this much, if the data decide what each layer receives."""


@dataclass(frozen=True)
class JobDirs:
    """The folders in which a job writes."""

    folder: Path
    """For the artifact; new or empty. Temporary files are written next to it."""
    cache: Path
    """Statistics that jobs share."""
    checkpoints: Path | None = None
    """Training checkpoints, from which another attempt at this recipe resumes. The caller removes them when no other
    attempt will follow."""


@dataclass(frozen=True)
class WorkRequest:
    """A job, and everything that one attempt at it reads and writes."""

    job: Job
    materials: Materials
    dirs: JobDirs
    parent: Path | None = None
    """The folder of the parent's artifact; None for the original, which has no parent."""
    built: Path | None = None
    """The folder of the job's artifact if it exists already; then it is only measured."""
    previous: Measurement | None = None
    """The measurement of `job.before` on `built`. Its items are not read again if it was taken in this environment."""
    sharing: Sharing = field(default_factory=Sharing)
    """How a training is spread over the ranks that work on this attempt together."""


@dataclass(frozen=True)
class JobOutput:
    """A job that succeeded."""

    measurement: Measurement
    seconds: float
    """The time that making the artifact took."""
    saved_seconds: float
    """The further time that it would have taken without cached statistics."""
    built: bool
    """Whether the artifact was made now, in the job's folder."""


@dataclass(frozen=True)
class RankDone:
    """A rank other than the first has nothing more to do; the first rank returns the outcome."""

    interrupted: bool = False
    """Whether all ranks were interrupted together."""


def attempt(request: WorkRequest, report: Report) -> JobOutput | Failure | RankDone:
    """Make the artifact of a job's recipe and measure it. Never raises: errors are returned as a Failure.

    Of several ranks (`jobs.training.ranks`) all make the model; the first alone writes and measures it, the others
    return RankDone.
    """
    try:
        ranks.take_device()
        _prepare_process(request.materials.model)
        if ranks.here().first:
            return _attempt(request, report)
        if request.built is None:
            _made(request, report)
        return RankDone()
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        if isinstance(error, JobInterruptedError) and error.on_all_ranks and not ranks.here().first:
            return RankDone(interrupted=True)
        return failure(error)
    finally:
        memory.release()  # at this point the frames that held the model are gone


@functools.cache
def _prepare_process(model: str) -> None:
    """Import the modules of the original's family before all imported objects are exempted from garbage collection;
    otherwise each collection traverses these modules again, which takes 0.1 s."""
    loading.original_layout(sources.locate(model))
    memory.freeze_libraries()


def _attempt(request: WorkRequest, report: Report) -> JobOutput:
    job, dirs = request.job, request.dirs
    started = time.perf_counter()
    saved_seconds = _make(request, report) if request.built is None else 0.0
    seconds = time.perf_counter() - started
    report(1.0, "measuring")
    previous = request.previous
    if previous is not None and previous.environment != environment(request.materials.target):
        previous = None
    subject = ShippedModel(
        request.built or dirs.folder,
        sources.locate(request.materials.model),
        request.materials,
        job.fidelity,
        dirs.folder.parent,
        dirs.cache,
        previous,
        report,
    )
    return JobOutput(measure(job.meters, subject), seconds, saved_seconds, request.built is None)


def _make(request: WorkRequest, report: Report) -> float:
    """Write the artifact of a job's recipe into the job's folder. Returns the seconds that statistics saved."""
    recipe = request.job.recipe
    model, notes, saved_seconds = _made(request, report)
    about = {"recipe": recipe.to_dict(), "text": str(recipe), "notes": notes}
    loading.save(model, request.dirs.folder, about)
    return saved_seconds


def _made(request: WorkRequest, report: Report) -> tuple[Model, list[dict[str, Any]], float]:
    """The model of a job's recipe, the notes on how it was made, and the seconds that statistics saved."""
    recipe, parent = request.job.recipe, request.parent
    if recipe.parent is None:
        report(0.0, "writing the original")
        return loading.load(sources.locate(request.materials.model)), [], 0.0
    if parent is None:
        raise LookupError(f"the artifact of {recipe.parent} is needed to make {recipe}, and was not passed")
    step = recipe.steps[-1]
    report(0.0, str(step))
    context = context_of(recipe, request.materials, request.dirs, report, request.sharing)
    model = _compressed(loading.load(parent, device()), step, context)
    notes = loading.read_provenance(parent).get("notes", [])
    if context.notes:
        notes = [*notes, {"step": str(step), **context.notes}]
    return model, notes, context.statistics.saved_seconds


def _compressed(model: Model, step: Technique, context: Context) -> Model:
    """The model after `step`. RuntimeError if it differs from the predicted layout, FloatingPointError if it is not
    finite."""
    expected = step.output_layout(model.layout())
    model = step.compress(model, context)
    actual = model.layout()
    if step.exact and actual != expected:
        raise RuntimeError(f"{step} made a model of another layout than it predicted")
    if actual.size_bytes() > expected.size_bytes() + _HEADER_BYTES:
        raise RuntimeError(
            f"{step} made a model of {actual.size_bytes()} bytes, it predicted {expected.size_bytes()}"
        )
    for name, tensor in model.module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"{step} made NaN or infinite values in {name}")
    return model


def context_of(
    recipe: Recipe, materials: Materials, dirs: JobDirs, report: Report, sharing: Sharing | None = None
) -> Context:
    """The context of the recipe's last step. It holds only the texts that the step needs: reading one takes seconds."""
    original = sources.locate(materials.model)
    step, parent = recipe.steps[-1], recipe.lineage()[-2]

    def rows(source: TextSource | None) -> Tensor | None:
        return None if source is None else data.windows_for(source, original)

    return Context(
        statistics=Statistics(dirs.cache, parent.id),
        workdir=dirs.folder.parent,
        seed=recipe.origin.seed,
        calibration=rows(materials.calibration) if step.needs & {"calibration", "gradients"} else None,
        training=rows(materials.training) if "training" in step.needs else None,
        teacher=lambda: placement.move_all(loading.load(original, device())),
        teacher_statistics=Statistics(dirs.cache, recipe.lineage()[0].id),
        checkpoints=dirs.checkpoints,
        sharing=sharing or Sharing(),
        report=report,
    )


def device() -> str:
    """The device on which jobs of this machine compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"
