"""Studies submitted to a cluster: the decision whether to start, and the command against a real Ray with a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.on_ray.jobs_api import JobState
from cluster.storage.s3_address import parse
from orchestrator.service.study_package import DIGEST, NAME, STORE
from orchestrator.service.submission import Attach, Start, decide, front_location, latest
from tests import fake_cluster
from tests.cluster.clouds import served
from tests.fake_cluster import ROOT, Head
from tests.processes import free_ports, without_ray


def job(id: str, status: str, digest: str = "d" * 64, began: float = 1.0) -> JobState:
    return JobState(id, status, "", {NAME: "tiny", DIGEST: digest, STORE: "s3://b/p?path_style=true"}, began)


def test_a_running_or_finished_study_is_not_started_again_and_a_failed_one_resumes_under_another_id() -> None:
    digest = "d" * 64
    first_id = f"tiny-{'d' * 12}"
    assert decide("tiny", digest, [JobState("x", "RUNNING", "", {})]) == Start(first_id)
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):
        existing = job(first_id, status)
        assert decide("tiny", digest, [existing]) == Attach(existing)
    ended_jobs = [job(first_id, "FAILED"), job(f"{first_id}-2", "STOPPED", began=2.0)]
    assert decide("tiny", digest, ended_jobs) == Start(f"{first_id}-3", ended_jobs[1])


def test_a_study_is_refused_while_it_runs_with_other_options() -> None:
    running = job("tiny-other", "RUNNING", digest="e" * 64)
    with pytest.raises(ValueError, match="tiny-other runs tiny with other options or data"):
        decide("tiny", "d" * 64, [running])
    ended_job = job("tiny-other", "STOPPED", digest="e" * 64)
    assert isinstance(decide("tiny", "d" * 64, [ended_job]), Start)


def test_a_name_selects_the_running_job_or_else_the_last_one() -> None:
    jobs = [job("a", "RUNNING", began=1), job("b", "STOPPED", began=2), JobState("c", "RUNNING", "", {}, 3)]
    assert latest("tiny", jobs).id == "a"
    assert latest("tiny", jobs[1:]).id == "b"
    assert latest("b", jobs).id == "b"
    assert front_location(jobs[0]) == "s3://b/p/tiny?path_style=true"
    with pytest.raises(LookupError, match="no study c; it has tiny"):
        latest("c", jobs)


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    with fake_cluster.head() as started:
        yield started


@pytest.mark.ray
def test_a_study_runs_on_the_cluster_and_is_not_run_again_when_submitted_again(
    head: Head, study_file: Path, s3_address: str
) -> None:
    study = [study_file, f"store={s3_address}", "search.candidates=1"]
    submission = head.slimfront("submit", *study, cwd=study_file.parent)
    assert submission.returncode == 0, submission.stdout + submission.stderr
    assert "Pareto front of tiny" in submission.stdout
    assert "was submitted" in submission.stderr
    resubmission = head.slimfront("submit", *study, cwd=study_file.parent)
    assert resubmission.returncode == 0
    assert "is succeeded already" in resubmission.stderr
    jobs = [job for job in head.ask("/api/jobs/") if s3_address in job["entrypoint"]]
    assert len(jobs) == 1
    assert jobs[0]["metadata"][NAME] == "tiny"
    front = head.slimfront("front", "tiny", "--json", cwd=study_file.parent)
    assert json.loads(front.stdout)["study"] == "tiny"
    report = head.slimfront("report", "tiny", cwd=study_file.parent)
    assert report.stdout.strip() == "tiny.html"
    assert "</html>" in (study_file.parent / "tiny.html").read_text()
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in json.dumps(jobs) + submission.stdout + submission.stderr


@pytest.mark.ray
def test_a_study_continues_after_ctrl_c_until_it_is_stopped_and_is_resumed_by_its_name(
    head: Head, study_file: Path, tmp_path: Path
) -> None:
    study = [study_file, "name=long", "search.candidates=500"]
    following = subprocess.Popen(
        head.command("submit", *study), cwd=tmp_path, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert following.stdout is not None
    assert any("searching" in line for line in following.stdout)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "continues; slimfront logs long-" in errors
    assert "Traceback" not in errors
    status_output = head.slimfront("status", "long", cwd=tmp_path).stdout
    assert "long: running as long-" in status_output
    assert "searching" in status_output.splitlines()[-1]
    conflicting = head.slimfront("submit", *study, "search.seed=1", "--no-follow", cwd=tmp_path)
    assert conflicting.returncode == 2
    assert "with other options or data" in conflicting.stderr
    assert "is running already" in head.slimfront("submit", *study, "--no-follow", cwd=tmp_path).stderr
    assert ": stopped" in head.slimfront("stop", "long", cwd=tmp_path).stdout
    assert (
        "resume with: slimfront resume long --address URL"
        in head.slimfront("logs", "long", cwd=tmp_path).stdout
    )
    assert "it resumes where long-" in head.slimfront("resume", "long", cwd=tmp_path).stderr
    stopped = head.slimfront("stop", "long", cwd=tmp_path)
    assert "-2: stopped" in stopped.stdout
    unknown = head.slimfront("status", "none", cwd=tmp_path)
    assert unknown.returncode == 3
    assert "has no study none" in unknown.stderr


@pytest.mark.ray
def test_a_refused_submission_prints_one_line_and_starts_nothing(
    head: Head, study_file: Path, s3_address: str, tmp_path: Path
) -> None:
    def refused(*args: object, code: int, **env: str) -> str:
        submission = head.slimfront("submit", study_file, "name=refused", *args, cwd=tmp_path, **env)
        assert submission.returncode == code, submission.stdout + submission.stderr
        assert submission.stderr.count("\n") == 1
        return submission.stderr

    no_token = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert "requires a token and there is none" in refused(code=3, **no_token)
    assert "does not take this token" in refused(code=3, RAY_AUTH_TOKEN="a" * 64)
    local_store = refused("store=runs", code=2, RAY_TMPDIR=str(tmp_path))
    assert "expected s3://bucket/prefix" in local_store
    large = tmp_path / "large.txt"
    large.write_bytes(os.urandom(101 * 2**20))
    missing_bucket = s3_address.replace(parse(s3_address).bucket, "no-such-bucket")
    message = refused(f"data.train.path={large}", f"store={missing_bucket}", code=3)
    assert "there is no bucket no-such-bucket" in message
    assert not [job for job in head.ask("/api/jobs/") if "refused" in job["entrypoint"]]


def answering(answers: dict[str, object]) -> AbstractContextManager[str]:
    """Serve the answers of a cluster's dashboard, and yield the address."""
    return served(
        lambda method, path, headers: (200 if path in answers else 404, json.dumps(answers.get(path)))
    )


def refusal(address: str, folder: Path, *args: str) -> str:
    env = {**without_ray(), "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    process = fake_cluster.slimfront(address, env, folder, "status", "x", *args)
    assert process.returncode == 3
    assert process.stderr.count("\n") == 1
    return process.stderr


def test_a_cluster_without_authentication_or_with_other_versions_is_refused(tmp_path: Path) -> None:
    versions = {"rayVersion": "2.60.0", "pythonVersion": "3.9.1"}
    answers: dict[str, object] = {
        "/api/authentication_mode": {"authentication_mode": "disabled"},
        "/api/version": {"version": "4", "ray_version": versions["rayVersion"], "session_name": "session"},
        "/api/v0/cluster_metadata": {"data": versions},
    }
    with answering(answers) as address:
        assert "accepts unauthenticated requests; start it with RAY_AUTH_MODE=token" in refusal(
            address, tmp_path
        )
        message = refusal(address, tmp_path, "--insecure")
    assert f"has Ray 2.60.0, Python 3.9.1, this machine Ray {version('ray')}" in message
    with answering({}) as address:
        assert "accepts unauthenticated requests" in refusal(address, tmp_path)  # a Ray older than tokens


def test_an_address_without_a_cluster_is_reported(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    assert f"no cluster answers at http://127.0.0.1:{port}" in refusal(f"http://127.0.0.1:{port}", tmp_path)
    assert "must be that of the cluster's dashboard" in refusal("auto", tmp_path)
    message = refusal("http://me:hunter2@127.0.0.1", tmp_path)
    assert "must not contain credentials" in message
    assert "hunter2" not in message
