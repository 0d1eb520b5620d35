"""The command as users run it: processes, exit codes, and a study on a real local Ray."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.executors.inline import InlineExecutor
from cluster.storage.local_store import LocalStore
from cluster.storage.open import open_store
from jobs.models import families
from orchestrator.cli import app
from orchestrator.config.load import load
from orchestrator.planning.prepare import prepare
from orchestrator.service import launch
from orchestrator.worker.work import WorkerContext, work


def slimfront(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *map(str, args)]
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": root}, check=False
    )


def test_an_invalid_study_exits_2_with_every_problem_and_no_traceback(study_file: Path) -> None:
    process = slimfront(
        "validate", study_file, "search.candidats=3", "target.threads=0", cwd=study_file.parent
    )
    assert process.returncode == 2
    assert "command line search.candidats: got candidats" in process.stderr
    assert "command line target.threads: got 0, expected 1 to" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (study_file.parent / "runs").exists()


def test_a_plan_runs_no_job(study_file: Path) -> None:
    process = slimfront("plan", study_file, cwd=study_file.parent)
    assert process.returncode == 0, process.stderr
    assert "5 candidates" in process.stdout
    assert "shared" in process.stdout
    assert "by shared steps" in process.stdout
    assert not (study_file.parent / "runs").exists()


def test_a_plan_states_the_price_and_the_allowed_node_hours_and_no_unknown_cost(
    study_file: Path,
) -> None:
    process = slimfront(
        "plan", study_file, "cluster.price_per_hour=2", "budget.money=20", cwd=study_file.parent
    )
    assert process.returncode == 0, process.stderr
    assert "The cost is unknown: nothing like it has run here." in process.stdout
    assert "A node-hour costs 2.00 (cluster.price_per_hour)." in process.stdout
    assert "The budget of 20.00 allows 10.00 node-hours." in process.stdout


def test_a_plan_after_a_study_states_its_cost_and_a_forecast(study_file: Path) -> None:
    ready = prepare(load(study_file, ("search.candidates=1",)))
    context = WorkerContext(
        ready.materials, ready.config.store, ready.folder.scratch, ready.folder.path / "cache"
    )
    do = functools.partial(work, context=context)
    launch.launch(ready, lambda status: None, executor=InlineExecutor(), do=do)
    result = CliRunner().invoke(app.app, ["plan", str(study_file), "cluster.price_per_hour=3600"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^About 0\.0\d node-hours, \d+\.\d{2,4}\.$", result.output, re.MULTILINE)
    assert re.search(r"^Until now: 0\.00 node-hours, \d+\.\d{2,4}\.$", result.output, re.MULTILINE)


def test_a_study_whose_budget_excludes_the_original_reports_it(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RayExecutor", lambda *_, **__: InlineExecutor())
    result = CliRunner().invoke(app.app, ["search", str(study_file), "budget.hours=1e-9"])
    assert result.exit_code == 1
    assert "The search ended early: the budget of 1e-09 hours is spent." in result.output
    assert "Neither the original nor any candidate was measured." in result.output


def test_techniques_are_listed_for_programs(tmp_path: Path) -> None:
    process = slimfront("techniques", "--json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    listed = {row["name"]: row for row in json.loads(process.stdout)}
    assert {"drop_layers", "prune_ffn", "svd_llm", "rtn", "gptq", "distill"} <= set(listed)
    assert listed["gptq"]["needs"] == ["calibration"]
    assert listed["gptq"]["families"] == families.names()
    assert "2210.17323" in listed["gptq"]["paper"]


def test_one_technique_is_shown_with_its_options_and_refusals(tmp_path: Path) -> None:
    process = slimfront("techniques", "prune_hidden", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "share of the hidden width to remove" in process.stdout
    assert "Refuses gemma3_text: its norms after each layer" in process.stdout.replace("\n", " ")
    invalid = slimfront("techniques", "prune_hiden", cwd=tmp_path)
    assert invalid.returncode == 3
    assert "did you mean prune_hidden?" in invalid.stderr


@pytest.mark.parametrize("command", ["status", "front", "report", "resume"])
def test_a_folder_without_a_study_exits_3(tmp_path: Path, command: str) -> None:
    process = slimfront(command, tmp_path, cwd=tmp_path)
    assert process.returncode == 3
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), sqlite3.OperationalError("database or disk is full")]
)
def test_a_full_disk_of_the_study_is_reported_with_a_remedy(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def raise_error(*_: object) -> None:
        raise error

    monkeypatch.chdir(study_file.parent)
    monkeypatch.setattr(launch, "launch", raise_error)
    result = CliRunner().invoke(app.app, ["search", str(study_file)])
    assert result.exit_code == 3
    assert "is full" in result.stderr
    assert "--trim" in result.stderr
    assert f"slimfront resume {study_file.parent}" in result.stderr


def test_another_error_of_the_study_is_not_reported_as_a_full_disk(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_error(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.chdir(study_file.parent)
    monkeypatch.setattr(launch, "launch", raise_error)
    assert isinstance(CliRunner().invoke(app.app, ["search", str(study_file)]).exception, OSError)


def test_a_store_is_shown_and_trimmed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "runs")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 5000)
    ref = store.put(tmp_path / "model")
    store.commit("artifacts/01", dataclasses.asdict(ref))
    listing = slimfront("store", "runs", cwd=tmp_path)
    assert listing.returncode == 0, listing.stderr
    assert "intermediate models" in listing.stdout
    assert "5.0 kB" in listing.stdout
    dry_run = slimfront("store", "runs", "--trim", "1kB", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(dry_run.stdout)["kinds"]["intermediates"]["removed_bytes"] == 5000
    assert store.has(ref)
    trimmed = slimfront("store", "runs", "--trim", "1kB", cwd=tmp_path)
    assert trimmed.returncode == 0, trimmed.stderr
    assert not store.has(ref)
    assert list(store.records("")) == []
    store.commit("results/01", {"recipe": {"steps": []}, "meters": [], "result": {"artifact": "a"}})
    assert slimfront("store", "runs", "--trim", "0", cwd=tmp_path).returncode == 1
    invalid = slimfront("store", "runs", "--trim", "lots", cwd=tmp_path)
    assert invalid.returncode == 3
    assert "give one like 5GB" in invalid.stderr
    missing = slimfront("store", "elsewhere", cwd=tmp_path)
    assert missing.returncode == 3
    assert "is not a store" in missing.stderr


def test_a_bucket_is_shown_and_swept_and_not_trimmed(tmp_path: Path, s3: Any, s3_address: str) -> None:
    store = open_store(s3_address)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 5000)
    store.put(tmp_path / "model")
    store.commit("results/01", {})
    bucket = s3_address.split("/")[2]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="of/a/team/objects/0/files/half")["UploadId"]
    part = {"Bucket": bucket, "Key": "of/a/team/objects/0/files/half", "UploadId": upload, "PartNumber": 1}
    s3.upload_part(**part, Body=b"x" * 3000)
    sweep = slimfront("store", s3_address, "--sweep", "--json", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    report = json.loads(sweep.stdout)
    assert report["kinds"]["models"]["size_bytes"] == 5000
    assert report["kinds"]["records"]["number"] == 1
    assert report["kinds"]["unfinished"]["size_bytes"] == 3000  # the upload may still continue
    assert report["swept_bytes"] == 0
    # moto reports uploads without parts as years old.
    s3.create_multipart_upload(Bucket=bucket, Key="of/a/team/objects/0/files/old")
    assert slimfront("store", s3_address, "--sweep", cwd=tmp_path).returncode == 0
    (remaining,) = s3.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert remaining["UploadId"] == upload
    refused = slimfront("store", s3_address, "--trim", "0", cwd=tmp_path)
    assert refused.returncode == 3
    assert "--sweep" in refused.stderr
    missing = slimfront("store", s3_address.replace(bucket, "no-such-bucket"), cwd=tmp_path)
    assert missing.returncode == 3
    assert "there is no bucket no-such-bucket" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_study_on_ray_is_interrupted_killed_resumed_inspected_and_exported(
    study_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs" / "tiny"
    command = [sys.executable, "-m", "orchestrator", "search", str(study_file)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}

    def start_and_wait(committed: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(list(tmp_path.glob("runs/records/results/*.json"))) < committed:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        return process

    stopped_process = start_and_wait(1)
    stopped_process.send_signal(signal.SIGTERM)
    _, errors = stopped_process.communicate(timeout=60)
    assert stopped_process.returncode == 130, errors
    assert f"slimfront resume {runs}" in errors
    assert "Traceback" not in errors
    assert f"slimfront resume {runs} resumes it" in slimfront("status", runs, cwd=tmp_path).stdout

    killed_process = start_and_wait(3)
    killed_process.kill()
    killed_process.wait()  # its pipes stay open while Ray's idle agents run, for a minute
    for pipe in (killed_process.stdout, killed_process.stderr):
        assert pipe is not None
        pipe.close()
    modified_before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/records/results/*.json")}

    resumed = slimfront("resume", runs, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "Pareto front of tiny" in resumed.stdout
    assert "done" in slimfront("status", runs, cwd=tmp_path).stdout
    assert all(file.stat().st_mtime_ns == modified_ns for file, modified_ns in modified_before.items())

    front = json.loads(slimfront("front", runs, "--json", cwd=tmp_path).stdout)
    assert front["study"] == "tiny"
    assert {"size_bytes", "accuracy"} <= set(front["original"]["metrics"])
    assert (runs / "report.html").is_file()
    member_id = front["members"][0]["id"]
    exported = slimfront("export", runs, tmp_path / "out", "--pick", member_id[:10], cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == front["members"][0]["metrics"]["size_bytes"]


def test_the_files_of_a_cluster_are_written_and_checked(tmp_path: Path) -> None:
    process = slimfront("init", "--template", "aws", "--gpu", "A10G", "here", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "Dockerfile",
        "aws.yaml",
        "constraints.txt",
    ]
    file = tmp_path / "here" / "aws.yaml"
    assert slimfront("doctor", "--template", file, cwd=tmp_path).returncode == 0
    file.write_text(
        file.read_text().replace("GPU: 1}", "GPU: 9}").replace("min_workers: 0", "min_worker: 0", 1)
    )
    invalid = slimfront("doctor", "--template", file, cwd=tmp_path)
    assert invalid.returncode == 2
    assert [line.partition(" ")[2] for line in invalid.stderr.splitlines()] == [
        "available_node_types.gpu-spot.min_worker: got min_worker, expected min_workers",
        "available_node_types.gpu-spot.resources.GPU: got 9, but a g5.2xlarge has 1 (no type has more than 8: "
        "g5.48xlarge)",
        "available_node_types.gpu.resources.GPU: got 9, but a g5.2xlarge has 1 (no type has more than 8: g5.48xlarge)",
    ]


def test_invalid_choices_of_a_cluster_exit_2_and_write_nothing(tmp_path: Path) -> None:
    process = slimfront("init", "--template", "gcp", "--gpu", "L5", "here", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "gpu: got L5, expected one of A100, H100, L4, T4",
        "project: got nothing, expected the id of a project of Google Cloud",
    ]
    assert not (tmp_path / "here").exists()
