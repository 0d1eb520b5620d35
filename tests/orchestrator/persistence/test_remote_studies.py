"""A complete study whose store is a bucket."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.executors.inline import InlineExecutor
from cluster.storage.open import open_store
from cluster.storage.s3_address import parse
from jobs import run
from orchestrator.config.problems import InvalidStudyError
from orchestrator.persistence.published import publish, published, published_report
from orchestrator.persistence.study_folder import StudyFolder
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.publishing.export import export_member
from orchestrator.service.launch import launch
from orchestrator.study.results import Results


def run_inline(prepared: PreparedStudy) -> Results:
    return launch(prepared, lambda status: None, executor=InlineExecutor())


def file_contents(folder: Path) -> Iterator[bytes]:
    yield from (file.read_bytes() for file in folder.rglob("*") if file.is_file())


def bucket_contents(s3: Any, bucket: str) -> Iterator[bytes]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            yield s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()


def test_a_study_stores_models_and_results_in_a_bucket_and_its_files_locally(
    prepared: Callable[..., PreparedStudy],
    s3: Any,
    s3_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ready = prepared(f"store={s3_address}")
    results = run_inline(ready)
    assert [candidate.state for candidate in results.candidates] == ["measured"] * 6
    study = tmp_path / "runs" / "tiny"
    front = json.loads((study / "front.json").read_text())
    store = open_store(s3_address)
    for member in front["members"]:
        assert store.record(f"artifacts/{member['id']}") is not None
    assert not (tmp_path / "runs" / "objects").exists()
    assert StudyFolder(study).store() == s3_address

    # Artifacts of another study are reused and not created again.
    executed_jobs = []
    attempt = run.attempt
    monkeypatch.setattr(
        run, "attempt", lambda request, report: executed_jobs.append(request.job) or attempt(request, report)
    )
    run_inline(prepared(f"store={s3_address}", "name=other"))
    assert executed_jobs == []

    # A model is exported from the bucket, or recreated if it was removed from the bucket.
    export_member(study, "smallest", tmp_path / "first")
    for artifact in store.holdings().artifacts:
        store.remove(artifact.ref)
    export_member(study, "smallest", tmp_path / "second")
    assert executed_jobs
    weights = "model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (tmp_path / "second" / weights).read_bytes()

    credential = b"secret-of-the-tests"
    assert not any(credential in content for content in file_contents(tmp_path / "runs"))
    assert not any(credential in content for content in bucket_contents(s3, parse(s3_address).bucket))
    with sqlite3.connect(study / "ledger.db") as ledger:
        assert not any(credential.decode() in line for line in ledger.iterdump())


def test_a_front_in_a_bucket_is_read_from_another_machine(s3_address: str, tmp_path: Path) -> None:
    bucket, mark, options = s3_address.partition("?")
    publish(s3_address, "tiny", {"members": ["a"]}, "<p>a")
    publish(s3_address, "tiny", {"members": ["a", "b"]}, "<p>a, b")
    assert published(f"{bucket}/tiny{mark}{options}") == {"members": ["a", "b"]}
    assert published_report(f"{bucket}/tiny{mark}{options}") == "<p>a, b"
    with pytest.raises(LookupError, match="holds no front of other"):
        published(f"{bucket}/other{mark}{options}")
    publish(str(tmp_path / "runs"), "tiny", {"members": []}, "")
    assert not (tmp_path / "runs").exists()


def test_a_missing_bucket_is_reported_in_one_line_and_starts_nothing(
    prepared: Callable[..., PreparedStudy], s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing_bucket = s3_address.replace(parse(s3_address).bucket, "no-such-bucket")
    with pytest.raises(InvalidStudyError) as error:
        prepared(f"store={missing_bucket}")
    (line,) = error.value.lines
    assert line.startswith("command line store: got there is no bucket no-such-bucket at http://")
    assert line.endswith(", expected a bucket to read and write, as s3://bucket/prefix")
    assert not (tmp_path / "runs").exists()


def test_an_address_with_credentials_is_refused_without_repeating_them(
    prepared: Callable[..., PreparedStudy],
) -> None:
    with pytest.raises(InvalidStudyError, match="credentials") as error:
        prepared("store=s3://me:hidden@bucket/runs")
    assert "hidden" not in str(error.value)
