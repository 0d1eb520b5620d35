"""Packages of studies: their content, their refusals, and the inputs that travel through the store."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest

from cluster.executors.inline import InlineExecutor
from cluster.storage.open import open_store
from jobs.job import Job, Outcome
from orchestrator.config.load import load
from orchestrator.config.problems import InvalidStudyError
from orchestrator.planning.prepare import prepare
from orchestrator.service import study_package as packages
from orchestrator.service.launch import _work, launch
from orchestrator.service.study_package import STORE, study_package, write_archive
from orchestrator.worker.work import WorkerContext, work


def test_the_same_study_makes_the_same_package_wherever_its_files_are(
    study_file: Path, tmp_path: Path
) -> None:
    other_folder = tmp_path / "elsewhere"
    other_folder.mkdir()
    text = load(study_file).config.data.evaluation.path
    shutil.copy(text, other_folder / Path(text).name)
    first = study_package(load(study_file), [], same_machine=False)
    moved = [
        f"data.{key}.path={other_folder / Path(text).name}" for key in ("evaluation", "calibration", "train")
    ]
    second = study_package(load(study_file, moved), [], same_machine=False)
    assert sorted(first.files) == sorted(second.files)
    assert first.digest == study_package(load(study_file), [], same_machine=False).digest
    assert (
        first.digest
        != study_package(load(study_file, ["search.seed=1"]), ["search.seed=1"], same_machine=False).digest
    )
    write_archive(first, tmp_path / "first.zip")
    for file in first.files.values():
        os.utime(file)
    write_archive(first, tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    names = zipfile.ZipFile(tmp_path / "first.zip").namelist()
    assert {"study.yaml", "orchestrator/__main__.py", "jobs/run.py", "cluster/on_ray/jobs_api.py"} <= set(
        names
    )
    assert sum(name.endswith("-topics.txt") for name in names) == 1  # three keys refer to it


def test_a_store_or_file_that_only_this_machine_has_is_refused_for_a_remote_cluster(study_file: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(ValueError) as error:
            study_package(load(study_file, overrides), overrides, same_machine=False)
        return str(error.value)

    assert "store: got runs, a folder that only this machine has" in refusal("store=runs")
    assert "data.evaluation.path: there is no none.txt on this machine" in refusal(
        "data.evaluation.path=none.txt"
    )
    assert "model: there is no ./none on this machine" in refusal("model=./none")
    message = refusal("tracking.uri=http://me:hunter2@mlflow")
    assert "contains a password" in message
    assert "hunter2" not in message
    local = study_package(load(study_file, ["store=runs"]), ["store=runs"], same_machine=True)
    assert local.metadata[STORE] == str(Path("runs").resolve())
    overrides = [
        "model=owner/name",
        "data.evaluation.path=/only/there.txt",
        "data.train.path=package:pydoc_data.topics",
    ]
    assert (
        len(study_package(load(study_file, overrides), overrides, same_machine=False).files) == 1
    )  # calibration


def test_inputs_too_large_for_the_archive_travel_through_the_store_and_each_machine_fetches_them(
    study_file: Path, s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "LIMIT_BYTES", packages._CODE_BYTES + 1000)
    options = [f"store={s3_address}", "search.candidates=1"]
    text = load(study_file).config.data.train.path  # type: ignore[union-attr]
    renamed_text = tmp_path / "a text: #1.txt"
    shutil.copy(text, renamed_text)
    study_file.write_text(
        study_file.read_text().replace(f"train: {{path: {text}", f'train: {{path: "{renamed_text}"')
    )
    package = study_package(load(study_file, options), options, same_machine=False)
    assert package.files == {}
    assert len(package.stored) == 3  # the model, the text of two keys, and its renamed copy
    overrides = shlex.split(package.entrypoint)[5:]
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    monkeypatch.chdir(cluster)
    with pytest.raises(InvalidStudyError, match=r"the store has no input .*: submit the study again"):
        prepare(load(study_file, overrides))
    for stored in [*package.stored, *package.stored]:
        stored.put(open_store(s3_address))
    prepared = prepare(load(study_file, overrides))
    assert prepared.plan.original.id == prepare(load(study_file, options)).plan.original.id

    def work_on_a_new_machine(job: Job, context: WorkerContext) -> Outcome:
        shutil.rmtree(cluster / "runs" / "inputs", ignore_errors=True)
        return work(job, context)

    do = functools.partial(work_on_a_new_machine, context=_work(prepared).keywords["context"])  # type: ignore[attr-defined]
    results = launch(prepared, lambda status: None, executor=InlineExecutor(), do=do)
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 2
