"""Pack a study for a cluster: one archive with the study file, the local files that it names, and slimfront itself.

The archive contains slimfront's three packages, so that the cluster runs the same version as this machine; torch and
all other libraries are installed on the cluster. Files that are too large for an archive travel through the study's
store. The command that the cluster runs contains overrides that point to the copies.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.on_ray.jobs_api import LIMIT_BYTES
from cluster.storage.open import is_remote
from jobs.text_files import is_hidden
from orchestrator.config.load import Loaded
from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.inputs import StoredInput, stored_input
from orchestrator.planning.address_checks import without_password
from orchestrator.planning.input_files import paths

PACKAGES = ("orchestrator", "jobs", "cluster")
NAME, DIGEST, STORE, VERSION = (f"slimfront.{key}" for key in ("study", "digest", "store", "version"))
"""The keys of a job's metadata."""
_CODE_BYTES = 10 * 2**20
"""The part of an archive that is reserved for slimfront's own packages."""


@dataclass(frozen=True)
class StudyPackage:
    """A study with everything that a cluster needs to run it."""

    study: str
    """The name of the study."""
    digest: str
    """Identifies the study and all local files that it reads."""
    text: str
    """The text of the study file."""
    files: Mapping[str, Path]
    """Local files by their path in the archive."""
    stored: Sequence[StoredInput]
    """Inputs that travel through the store instead."""
    store: str
    """The address of the store."""
    entrypoint: str
    """The command that the cluster runs."""
    metadata: Mapping[str, str]
    """The metadata of the job."""


def study_package(loaded: Loaded, overrides: Sequence[str], same_machine: bool) -> StudyPackage:
    """Return the package of a study that was read without problems. Relative paths count from the working directory.

    same_machine: whether the cluster runs on this machine. Raises ValueError if only this machine can reach the store,
    if a file is missing or too large, and if an address contains a password.
    """
    config = loaded.config
    if any(without_password(text) != text for text in (loaded.text, *overrides)):
        raise ValueError(
            "an address in the study contains a password, which everybody who sees the cluster would see: put it "
            "into the cluster's environment, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow"
        )
    store = _store_address(config, same_machine)
    path_by_key = {key: Path(path).expanduser().resolve() for key, path in _local_paths(config).items()}
    inputs = {path: _read_input(path) for path in path_by_key.values()}
    packed, through_store = _divide(inputs.values())
    addresses = {local.path: local.name for local in packed}
    addresses |= {local.path: local.stored.address for local in through_store}
    rewritten = [f"{key}={addresses[path]}" for key, path in path_by_key.items()]
    rewritten += [f"store={store}", "cluster.address=auto"]
    files: dict[str, Path] = {}
    for local in packed:
        files.update((local.name + inner, file) for inner, file in local.files.items())
    digest = hashlib.sha256(json.dumps([loaded.text, *overrides, *rewritten]).encode()).hexdigest()
    arguments = shlex.join(["study.yaml", *overrides, *rewritten])
    return StudyPackage(
        study=config.name,
        digest=digest,
        text=loaded.text,
        files=files,
        stored=[local.stored for local in through_store],
        store=store,
        entrypoint=f"python -m orchestrator search {arguments}",
        metadata={NAME: config.name, DIGEST: digest, STORE: store, VERSION: metadata.version("slimfront")},
    )


def write_archive(package: StudyPackage, archive: Path) -> None:
    """Write the archive of a package. The same content gives the same bytes.

    Raises ValueError if the archive is larger than a cluster accepts.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(_entry("study.yaml"), package.text)
        for name, file in {**_code_files(), **package.files}.items():
            with file.open("rb") as source, out.open(_entry(name), "w", force_zip64=True) as target:
                while (chunk := source.read(2**20)) and archive.stat().st_size <= LIMIT_BYTES:
                    target.write(chunk)
    if archive.stat().st_size > LIMIT_BYTES:
        raise ValueError(
            f"the package of the study is larger than the {LIMIT_BYTES // 2**20} MiB that a cluster accepts"
        )


def _code_files() -> dict[str, Path]:
    """Return the files of slimfront's packages by their path in the archive."""
    files = {}
    for package in PACKAGES:
        root = Path(__file__).parents[2] / package
        for file in sorted(root.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                files[f"{package}/{file.relative_to(root).as_posix()}"] = file
    return files


def _store_address(config: StudyConfig, same_machine: bool) -> str:
    if is_remote(config.store) or Path(config.store).is_absolute():
        return config.store
    if same_machine:
        return str(Path(config.store).expanduser().resolve())
    raise ValueError(
        f"store: got {config.store}, a folder that only this machine has; expected s3://bucket/prefix, or the "
        "absolute path of a folder that all machines of the cluster share"
    )


def _local_paths(config: StudyConfig) -> dict[str, str]:
    """Return the local files and folders that a study reads, by key.

    Excluded are inputs that the cluster finds without this machine: `package:NAME`, a hub id, and an absolute path that
    does not exist on this machine. Raises ValueError for any other path without a file.
    """
    local = {}
    for key, text in paths(config).items():
        if text.startswith("package:"):
            continue
        path = Path(text).expanduser()
        if path.exists():
            local[key] = text
            continue
        is_hub_id = key == "model" and not text.startswith(".") and text.count("/") == 1
        if not path.is_absolute() and not is_hub_id:
            raise ValueError(
                f"{key}: there is no {text} on this machine; give a file of the cluster by its absolute path"
            )
    return local


@dataclass(frozen=True)
class _LocalInput:
    """A file or folder of this machine that the study reads."""

    path: Path
    files: Mapping[str, Path]
    """The files by the part of their path that follows `path`: empty for a single file, `/inner` in a folder."""
    sha256: Mapping[str, str]
    """The digest of each file."""

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def name(self) -> str:
        """The path in the archive. It depends on the content and the file name, not on the folder above."""
        total = hashlib.sha256()
        for inner, sha256 in self.sha256.items():
            total.update(f"{inner}:{sha256}\n".encode())
        return f"inputs/{total.hexdigest()[:12]}-{self._plain_name}"

    @property
    def _plain_name(self) -> str:
        """The file name without characters that have a meaning in a shell, in YAML or in a bucket."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", self.path.name)

    @property
    def stored(self) -> StoredInput:
        """The same input as an artifact of the store."""
        if "" in self.files:
            name = self._plain_name
            return stored_input({name: self.path}, {name: self.sha256[""]}, name)
        files = {inner.removeprefix("/"): file for inner, file in self.files.items()}
        digests = {inner.removeprefix("/"): sha256 for inner, sha256 in self.sha256.items()}
        return stored_input(files, digests, None)


def _read_input(path: Path) -> _LocalInput:
    files, sha256 = _visible_files(path), {}
    for inner, file in files.items():
        with file.open("rb") as content:
            sha256[inner] = hashlib.file_digest(content, "sha256").hexdigest()
    return _LocalInput(path, files, sha256)


def _visible_files(path: Path) -> dict[str, Path]:
    """Return a single file, or the files of a folder without hidden ones, as in `_LocalInput.files`."""
    if path.is_file():
        return {"": path}
    files = {}
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if file.is_file() and not is_hidden(inner):
            files[f"/{inner.as_posix()}"] = file
    return files


def _divide(inputs: Iterable[_LocalInput]) -> tuple[list[_LocalInput], list[_LocalInput]]:
    """Return the inputs that fit into the archive, smallest first, and those that travel through the store."""
    packed: list[_LocalInput] = []
    through_store: list[_LocalInput] = []
    remaining_bytes = LIMIT_BYTES - _CODE_BYTES
    for local in sorted(inputs, key=lambda local: local.size_bytes):
        remaining_bytes -= local.size_bytes
        if remaining_bytes >= 0:
            packed.append(local)
        else:
            through_store.append(local)
    return packed, through_store


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a file of the archive without its time of change, which would change the bytes of the archive."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry
