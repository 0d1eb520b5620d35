"""Submit a study to a cluster as a Ray job, find it there by its name, and resume it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.on_ray.jobs_api import Jobs, JobState
from cluster.storage.open import open_store
from orchestrator.service.study_package import DIGEST, NAME, STORE, StudyPackage, write_archive


@dataclass(frozen=True)
class Attach:
    """The cluster has a job of this study already."""

    job: JobState


@dataclass(frozen=True)
class Start:
    """The study is to be started as a new job."""

    id: str
    """The id of the new job."""
    resumed: JobState | None = None
    """The earlier job of the same study that ended without success."""


def job_id(study: str, digest: str, attempt: int) -> str:
    """Return the id of a job. Ray keeps the ids of jobs that ended, so each attempt has another one."""
    name = f"{study}-{digest[:12]}"
    if attempt == 1:
        return name
    return f"{name}-{attempt}"


def decide(study: str, digest: str, jobs: Sequence[JobState]) -> Attach | Start:
    """Decide whether a study needs a new job next to the jobs of a cluster.

    A study that is running or has succeeded is not started again; one that failed or was stopped is resumed by a new
    job. Raises ValueError if another version of the study is running.
    """
    jobs_of_study = [job for job in jobs if job.metadata.get(NAME) == study]
    attempts = [job for job in jobs_of_study if job.metadata.get(DIGEST) == digest]
    for job in jobs_of_study:
        if not job.ended and job not in attempts:
            raise ValueError(
                f"{job.id} runs {study} with other options or data; stop it first (slimfront stop {study}), or give "
                "this one another name (name=…)"
            )
    active = [job for job in attempts if not job.ended or job.status == "SUCCEEDED"]
    if active:
        return Attach(active[-1])
    id = job_id(study, digest, len(attempts) + 1)
    if attempts:
        return Start(id, attempts[-1])
    return Start(id)


def submit(package: StudyPackage, jobs: Jobs) -> Attach | Start:
    """Start a study on a cluster unless it has a job there, and return the decision.

    Inputs that are too large for the archive are stored first. Raises the errors of `decide`, `write_archive` and
    `ArtifactStore.put`.
    """
    decision = decide(package.study, package.digest, jobs.all())
    if isinstance(decision, Attach):
        return decision
    if package.stored:
        store = open_store(package.store)
        for stored in package.stored:
            stored.put(store)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"{package.study}.zip"
        write_archive(package, archive)
        try:
            jobs.submit(decision.id, package.entrypoint, archive, package.metadata)
        except FileExistsError:  # another process submitted the same study at the same time
            return Attach(jobs.state(decision.id))
    return decision


def resume(name: str, jobs: Jobs) -> Attach | Start:
    """Resume a study that ended on a cluster before it was done, with the archive of its last job.

    Raises LookupError if the cluster has no study of that name, or has removed its archive.
    """
    all_jobs = jobs.all()
    last = latest(name, all_jobs)
    decision = decide(last.metadata[NAME], last.metadata[DIGEST], all_jobs)
    if isinstance(decision, Start):
        jobs.again(decision.id, last.id)
    return decision


def latest(name: str, jobs: Sequence[JobState]) -> JobState:
    """Return the last job of a study, by the name of the study or the id of the job. Raises LookupError without one."""
    submitted = [job for job in jobs if NAME in job.metadata]
    matching = [job for job in submitted if name in (job.id, job.metadata[NAME])]
    if matching:
        return max(matching, key=lambda job: (not job.ended, job.began))
    studies = ", ".join(sorted({job.metadata[NAME] for job in submitted}))
    raise LookupError(f"the cluster has no study {name}; it has {studies or 'none'}")


def front_location(job: JobState) -> str:
    """Return the location of the front of a job's study: its folder, or STORE/NAME of a bucket."""
    path, mark, options = job.metadata[STORE].partition("?")
    return f"{path.rstrip('/')}/{job.metadata[NAME]}{mark}{options}"
