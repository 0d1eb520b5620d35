"""Submission: a study as a job for a cluster: what is packed, how it is started, and by which name it is known.

A package holds the study file as it stands, the local files that it names, and slimfront's own three packages, so that
the cluster runs the version that is here. What of the files is too large for a package goes through the study's store.
The job's own overrides say where the files are. The rest (torch and what else slimfront needs) is the cluster's.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.on_ray.jobs_api import LIMIT_BYTES, Jobs, JobState
from cluster.storage.open import is_remote, open_store
from orchestrator.config.load import Loaded
from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.inputs import StoredInput, stored
from orchestrator.planning.input_files import paths

OURS = ("orchestrator", "jobs", "cluster")
NAME, DIGEST, STORE, VERSION = (f"slimfront.{key}" for key in ("study", "digest", "store", "version"))
"""The keys of a job's metadata."""
_OWN_BYTES = 10 * 2**20
"""What is left for ourselves in a package."""
_PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


@dataclass(frozen=True)
class Submission:
    """A study to be run by a cluster. files: what is packed, by its name in the package. stored: what goes through the
    store at the address `store` instead. digest: of the study and all that it reads from here."""

    study: str
    digest: str
    text: str
    files: Mapping[str, Path]
    stored: Sequence[StoredInput]
    store: str
    entrypoint: str
    metadata: Mapping[str, str]


def submission(loaded: Loaded, overrides: Sequence[str], here: bool) -> Submission:
    """The submission of a study that was read without problems. Paths count from where this runs.

    here: whether the cluster is on this machine. ValueError where the store is one that only this machine has, where a
    file is missing or too large, and where an address holds a password.
    """
    config = loaded.config
    if any(_PASSWORD.search(one) for one in (loaded.text, *overrides)):
        raise ValueError(
            "an address in the study holds a password, which everybody who sees the cluster would see: put it into "
            "the cluster's own environment, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow"
        )
    store = _store(config, here)
    inputs = {key: Path(path).expanduser().resolve() for key, path in _inputs(config).items()}
    held = {place: _input(place) for place in inputs.values()}
    packed, through_store = _divided(held.values())
    places = {one.place: one.name for one in packed} | {
        one.place: one.stored.address for one in through_store
    }
    rewritten = [f"{key}={places[place]}" for key, place in inputs.items()]
    rewritten += [f"store={store}", "cluster.address=auto"]
    files = {one.name + inner: file for one in packed for inner, file in one.files.items()}
    digest = hashlib.sha256(json.dumps([loaded.text, *overrides, *rewritten]).encode()).hexdigest()
    arguments = shlex.join(["study.yaml", *overrides, *rewritten])
    return Submission(
        study=config.name,
        digest=digest,
        text=loaded.text,
        files=files,
        stored=[one.stored for one in through_store],
        store=store,
        entrypoint=f"python -m orchestrator search {arguments}",
        metadata={NAME: config.name, DIGEST: digest, STORE: store, VERSION: metadata.version("slimfront")},
    )


def pack(submitted: Submission, package: Path) -> None:
    """Write the package, always the same for the same content. ValueError when it gets larger than a cluster takes."""
    ours = {
        f"{room}/{file.relative_to(root).as_posix()}": file
        for room in OURS
        for root in [Path(__file__).parents[2] / room]
        for file in sorted(root.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(_entry("study.yaml"), submitted.text)
        for name, file in {**ours, **submitted.files}.items():
            with file.open("rb") as source, out.open(_entry(name), "w", force_zip64=True) as to:
                while (piece := source.read(2**20)) and package.stat().st_size <= LIMIT_BYTES:
                    to.write(piece)
    if package.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"the package is larger than the {LIMIT_BYTES // 2**20} MiB that a cluster takes")


def job_id(study: str, digest: str, attempt: int) -> str:
    """The name of a job. Ray keeps those of jobs that ended, so each further attempt has another one."""
    return f"{study}-{digest[:12]}" + (f"-{attempt}" if attempt > 1 else "")


@dataclass(frozen=True)
class Attach:
    """The study is a job already, and this is how it is."""

    job: JobState


@dataclass(frozen=True)
class Start:
    """The study is to be started, by this name. again: the job that ended before."""

    id: str
    again: JobState | None = None


def what_to_do(study: str, digest: str, jobs: Sequence[JobState]) -> Attach | Start:
    """Whether to start a study beside the jobs that a cluster has. What runs or has succeeded is not started again,
    what failed or was stopped goes on. ValueError where another version of the study is running."""
    of_study = [job for job in jobs if job.metadata.get(NAME) == study]
    same = [job for job in of_study if job.metadata.get(DIGEST) == digest]
    for job in of_study:
        if not job.ended and job not in same:
            raise ValueError(
                f"{job.id} runs {study} with other options or data; stop it first (slimfront stop {study}), or give "
                "this one another name (name=…)"
            )
    going = [job for job in same if not job.ended or job.status == "SUCCEEDED"]
    if going:
        return Attach(going[-1])
    return Start(job_id(study, digest, len(same) + 1), same[-1] if same else None)


def submit(submitted: Submission, jobs: Jobs) -> Attach | Start:
    """Start a study on a cluster, unless it is there already; tells which. What goes through the store is put there
    before. See `what_to_do` and `pack` for the reasons not to, and ArtifactStore for what a store may raise."""
    done = what_to_do(submitted.study, submitted.digest, jobs.all())
    if isinstance(done, Attach):
        return done
    if submitted.stored:
        store = open_store(submitted.store)
        for one in submitted.stored:
            one.put(store)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{submitted.study}.zip"
        pack(submitted, package)
        try:
            jobs.submit(done.id, submitted.entrypoint, package, submitted.metadata)
        except FileExistsError:  # somebody submitted the same at the same time
            return Attach(jobs.state(done.id))
    return done


def resume(name: str, jobs: Jobs) -> Attach | Start:
    """Let a study go on that ended on a cluster before it was done, with what was packed then. LookupError where the
    cluster knows none of that name, or has dropped its package."""
    every = jobs.all()
    last = latest(name, every)
    done = what_to_do(last.metadata[NAME], last.metadata[DIGEST], every)
    if isinstance(done, Start):
        jobs.again(done.id, last.id)
    return done


def latest(name: str, jobs: Sequence[JobState]) -> JobState:
    """The last job of a study of this name, or of this id. LookupError if there is none."""
    ours = [job for job in jobs if NAME in job.metadata]
    found = [job for job in ours if name in (job.id, job.metadata[NAME])]
    if not found:
        known = sorted({job.metadata[NAME] for job in ours})
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise LookupError(f"the cluster has no study {name}; {there}")
    return max(found, key=lambda job: (not job.ended, job.began))


def front_location(job: JobState) -> str:
    """Where the study of a job keeps its front: its folder, or STORE/NAME of a bucket."""
    path, mark, options = job.metadata[STORE].partition("?")
    return f"{path.rstrip('/')}/{job.metadata[NAME]}{mark}{options}"


def _store(config: StudyConfig, here: bool) -> str:
    if is_remote(config.store) or Path(config.store).is_absolute():
        return config.store
    if here:
        return str(Path(config.store).expanduser().resolve())
    raise ValueError(
        f"store: got {config.store}, a folder that only this machine has; expected s3://bucket/prefix, or the whole "
        "path of a folder that all machines of the cluster share"
    )


def _inputs(config: StudyConfig) -> dict[str, str]:
    """The files and folders of this machine that a study reads, by its key; not what the cluster finds by itself:
    `package:NAME`, a model of a hub, a whole path that is not here. ValueError where there is no such file."""
    found = {}
    for key, path in paths(config).items():
        if path.startswith("package:"):
            continue
        place = Path(path).expanduser()
        if place.exists():
            found[key] = path
        elif not place.is_absolute() and (key != "model" or path.startswith(".") or path.count("/") != 1):
            raise ValueError(
                f"{key}: there is no {path} here; what only the cluster has is given by its whole path"
            )
    return found


def _files(place: Path) -> dict[str, Path]:
    """Each file of a folder, or the one that it is, by what follows the place's name. Not what is hidden."""
    if place.is_file():
        return {"": place}
    inner = {file.relative_to(place): file for file in sorted(place.rglob("*")) if file.is_file()}
    shown = {path: file for path, file in inner.items() if not any(part[0] == "." for part in path.parts)}
    return {f"/{path.as_posix()}": file for path, file in shown.items()}


@dataclass(frozen=True)
class _Input:
    """A file or folder of this machine. files: by what follows its name; sha256: of each."""

    place: Path
    files: Mapping[str, Path]
    sha256: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def name(self) -> str:
        """What it is called in the package: by its content, wherever it lies here."""
        total = hashlib.sha256()
        for inner, sha256 in self.sha256.items():
            total.update(f"{inner}:{sha256}\n".encode())
        return f"inputs/{total.hexdigest()[:12]}-{self._plain_name}"

    @property
    def _plain_name(self) -> str:
        """Without what means something to a shell, to YAML or to a bucket."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", self.place.name)

    @property
    def stored(self) -> StoredInput:
        """As what goes through the store."""
        if "" in self.files:
            name = self._plain_name
            return stored({name: self.place}, {name: self.sha256[""]}, name)
        inner = {name.removeprefix("/"): file for name, file in self.files.items()}
        return stored(inner, {name.removeprefix("/"): digest for name, digest in self.sha256.items()}, None)


def _input(place: Path) -> _Input:
    files, sha256 = _files(place), {}
    for inner, file in files.items():
        with file.open("rb") as content:
            sha256[inner] = hashlib.file_digest(content, "sha256").hexdigest()
    return _Input(place, files, sha256)


def _divided(inputs: Iterable[_Input]) -> tuple[list[_Input], list[_Input]]:
    """What goes into the package, the smallest first as long as there is room, and what through the store."""
    packed: list[_Input] = []
    beyond: list[_Input] = []
    left = LIMIT_BYTES - _OWN_BYTES
    for one in sorted(inputs, key=lambda one: one.size_bytes):
        left -= one.size_bytes
        (packed if left >= 0 else beyond).append(one)
    return packed, beyond


def _entry(name: str) -> zipfile.ZipInfo:
    """A file of the package; without the time at which it was changed, which must not make another package of it."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry
