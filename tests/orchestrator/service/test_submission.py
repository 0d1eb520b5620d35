"""Studies submitted to a cluster: what is packed and decided, and the command against a real Ray with a token."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.executors.inline import InlineExecutor
from cluster.on_ray.jobs_api import JobState
from cluster.storage.open import open_store
from cluster.storage.s3_address import parse
from jobs.job import Job, Outcome
from orchestrator.config.load import load
from orchestrator.config.problems import InvalidStudyError
from orchestrator.planning.prepare import prepare
from orchestrator.service import submission
from orchestrator.service.launch import _work, launch
from orchestrator.service.submission import (
    DIGEST,
    NAME,
    STORE,
    Attach,
    Start,
    front_location,
    latest,
    pack,
    what_to_do,
)
from orchestrator.worker.work import WorkerContext, work
from tests import fake_cluster
from tests.cluster.clouds import served
from tests.fake_cluster import ROOT, Head
from tests.processes import free_ports, without_ray


def job(id: str, status: str, digest: str = "d" * 64, began: float = 1.0) -> JobState:
    return JobState(id, status, "", {NAME: "tiny", DIGEST: digest, STORE: "s3://b/p?path_style=true"}, began)


def test_what_runs_or_has_succeeded_is_not_started_again_and_what_failed_goes_on_by_another_id() -> None:
    digest = "d" * 64
    first = f"tiny-{'d' * 12}"
    assert what_to_do("tiny", digest, [JobState("x", "RUNNING", "", {})]) == Start(first)
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):
        there = job(first, status)
        assert what_to_do("tiny", digest, [there]) == Attach(there)
    ended = [job(first, "FAILED"), job(f"{first}-2", "STOPPED", began=2.0)]
    assert what_to_do("tiny", digest, ended) == Start(f"{first}-3", ended[1])


def test_a_study_that_runs_with_other_options_is_not_started_beside_itself() -> None:
    running = job("tiny-other", "RUNNING", digest="e" * 64)
    with pytest.raises(ValueError, match="tiny-other runs tiny with other options or data"):
        what_to_do("tiny", "d" * 64, [running])
    ended = job("tiny-other", "STOPPED", digest="e" * 64)
    assert isinstance(what_to_do("tiny", "d" * 64, [ended]), Start)


def test_a_name_means_the_job_that_runs_else_the_last_one() -> None:
    jobs = [job("a", "RUNNING", began=1), job("b", "STOPPED", began=2), JobState("c", "RUNNING", "", {}, 3)]
    assert latest("tiny", jobs).id == "a"
    assert latest("tiny", jobs[1:]).id == "b"
    assert latest("b", jobs).id == "b"
    assert front_location(jobs[0]) == "s3://b/p/tiny?path_style=true"
    with pytest.raises(LookupError, match="no study c; it has tiny"):
        latest("c", jobs)


def test_the_same_study_makes_the_same_package_wherever_it_lies(study_file: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    text = load(study_file).config.data.evaluation.path
    shutil.copy(text, there / Path(text).name)
    one = submission.submission(load(study_file), [], here=False)
    moved = [f"data.{key}.path={there / Path(text).name}" for key in ("evaluation", "calibration", "train")]
    two = submission.submission(load(study_file, moved), [], here=False)
    assert sorted(one.files) == sorted(two.files)
    assert one.digest == submission.submission(load(study_file), [], here=False).digest
    assert (
        one.digest
        != submission.submission(load(study_file, ["search.seed=1"]), ["search.seed=1"], here=False).digest
    )
    pack(one, tmp_path / "one.zip")
    for file in one.files.values():
        os.utime(file)
    pack(one, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    names = zipfile.ZipFile(tmp_path / "one.zip").namelist()
    assert {"study.yaml", "orchestrator/__main__.py", "jobs/run.py", "cluster/on_ray/jobs_api.py"} <= set(
        names
    )
    assert sum(name.endswith("-topics.txt") for name in names) == 1  # three keys name it


def test_what_only_this_machine_has_is_refused_for_another_one(study_file: Path) -> None:
    def refusal(*overrides: str, here: bool = False) -> str:
        with pytest.raises(ValueError) as error:
            submission.submission(load(study_file, overrides), overrides, here)
        return str(error.value)

    assert "store: got runs, a folder that only this machine has" in refusal("store=runs")
    assert "data.evaluation.path: there is no none.txt here" in refusal("data.evaluation.path=none.txt")
    assert "model: there is no ./none here" in refusal("model=./none")
    told = refusal("tracking.uri=http://me:hunter2@mlflow")
    assert "holds a password" in told
    assert "hunter2" not in told
    kept = submission.submission(load(study_file, ["store=runs"]), ["store=runs"], here=True)
    assert kept.metadata[STORE] == str(Path("runs").resolve())
    own = [
        "model=owner/name",
        "data.evaluation.path=/only/there.txt",
        "data.train.path=package:pydoc_data.topics",
    ]
    assert len(submission.submission(load(study_file, own), own, here=False).files) == 1  # calibration


def test_what_is_too_large_for_a_package_goes_through_the_store_and_is_fetched_by_each_machine(
    study_file: Path, s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "LIMIT_BYTES", submission._OWN_BYTES + 1000)
    ours = [f"store={s3_address}", "search.candidates=1"]
    text = load(study_file).config.data.train.path  # type: ignore[union-attr]
    odd = tmp_path / "a text: #1.txt"
    shutil.copy(text, odd)
    study_file.write_text(study_file.read_text().replace(f"train: {{path: {text}", f'train: {{path: "{odd}"'))
    submitted = submission.submission(load(study_file, ours), ours, here=False)
    assert submitted.files == {}
    assert len(submitted.stored) == 3  # the model, the text that two keys name, and that with another name
    overrides = shlex.split(submitted.entrypoint)[5:]
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    monkeypatch.chdir(cluster)
    with pytest.raises(InvalidStudyError, match="is gone from the store: submit the study again"):
        prepare(load(study_file, overrides))
    for one in [*submitted.stored, *submitted.stored]:
        one.put(open_store(s3_address))
    there = prepare(load(study_file, overrides))
    assert there.plan.original.id == prepare(load(study_file, ours)).plan.original.id

    def on_a_bare_machine(job: Job, context: WorkerContext) -> Outcome:
        shutil.rmtree(cluster / "runs" / "inputs", ignore_errors=True)
        return work(job, context)

    doing = functools.partial(on_a_bare_machine, context=_work(there).keywords["context"])  # type: ignore[attr-defined]
    results = launch(there, lambda status: None, executor=InlineExecutor(), do=doing)
    assert [one.state for one in results.candidates] == ["measured"] * 2


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    with fake_cluster.head() as found:
        yield found


@pytest.mark.ray
def test_a_study_runs_on_the_cluster_and_submitted_again_it_is_not_run_again(
    head: Head, study_file: Path, s3_address: str
) -> None:
    study = [study_file, f"store={s3_address}", "search.candidates=1"]
    done = head.slimfront("submit", *study, cwd=study_file.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pareto front of tiny" in done.stdout
    assert "was submitted" in done.stderr
    again = head.slimfront("submit", *study, cwd=study_file.parent)
    assert again.returncode == 0
    assert "is succeeded already" in again.stderr
    jobs = [one for one in head.ask("/api/jobs/") if s3_address in one["entrypoint"]]
    assert len(jobs) == 1
    assert jobs[0]["metadata"][NAME] == "tiny"
    front = head.slimfront("front", "tiny", "--json", cwd=study_file.parent)
    assert json.loads(front.stdout)["study"] == "tiny"
    report = head.slimfront("report", "tiny", cwd=study_file.parent)
    assert report.stdout.strip() == "tiny.html"
    assert "</html>" in (study_file.parent / "tiny.html").read_text()
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in json.dumps(jobs) + done.stdout + done.stderr


@pytest.mark.ray
def test_a_study_goes_on_after_ctrl_c_until_it_is_stopped_and_is_resumed_by_its_name(
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
    _, told = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "goes on" in told
    assert "Traceback" not in told
    shown = head.slimfront("status", "long", cwd=tmp_path).stdout
    assert "long: running as long-" in shown
    assert "searching" in shown.splitlines()[-1]
    other = head.slimfront("submit", *study, "search.seed=1", "--no-follow", cwd=tmp_path)
    assert other.returncode == 2
    assert "with other options or data" in other.stderr
    assert "is running already" in head.slimfront("submit", *study, "--no-follow", cwd=tmp_path).stderr
    assert ": stopped" in head.slimfront("stop", "long", cwd=tmp_path).stdout
    assert (
        "go on with: slimfront resume long --address URL"
        in head.slimfront("logs", "long", cwd=tmp_path).stdout
    )
    assert "it resumes where long-" in head.slimfront("resume", "long", cwd=tmp_path).stderr
    stopped = head.slimfront("stop", "long", cwd=tmp_path)
    assert "-2: stopped" in stopped.stdout
    unknown = head.slimfront("status", "none", cwd=tmp_path)
    assert unknown.returncode == 3
    assert "has no study none" in unknown.stderr


@pytest.mark.ray
def test_what_can_not_be_submitted_is_one_line_and_nothing_runs(
    head: Head, study_file: Path, s3_address: str, tmp_path: Path
) -> None:
    def refused(*args: object, code: int, **env: str) -> str:
        done = head.slimfront("submit", study_file, "name=refused", *args, cwd=tmp_path, **env)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1
        return done.stderr

    nowhere = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert "requires a token and there is none" in refused(code=3, **nowhere)
    assert "does not take this token" in refused(code=3, RAY_AUTH_TOKEN="a" * 64)
    elsewhere = refused("store=runs", code=2, RAY_TMPDIR=str(tmp_path))
    assert "expected s3://bucket/prefix" in elsewhere
    large = tmp_path / "large.txt"
    large.write_bytes(os.urandom(101 * 2**20))
    gone = s3_address.replace(parse(s3_address).bucket, "no-such-bucket")
    told = refused(f"data.train.path={large}", f"store={gone}", code=3)
    assert "there is no bucket no-such-bucket" in told
    assert not [one for one in head.ask("/api/jobs/") if "refused" in one["entrypoint"]]


def answering(answers: dict[str, object]) -> AbstractContextManager[str]:
    """A server that answers as a cluster's dashboard would; its address."""
    return served(
        lambda method, path, headers: (200 if path in answers else 404, json.dumps(answers.get(path)))
    )


def refusal(address: str, folder: Path, *args: str) -> str:
    env = {**without_ray(), "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    done = fake_cluster.slimfront(address, env, folder, "status", "x", *args)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_cluster_that_lets_anybody_in_or_has_other_versions_is_refused_by_name(tmp_path: Path) -> None:
    there = {"rayVersion": "2.60.0", "pythonVersion": "3.9.1"}
    answers: dict[str, object] = {
        "/api/authentication_mode": {"authentication_mode": "disabled"},
        "/api/version": {"version": "4", "ray_version": there["rayVersion"], "session_name": "session"},
        "/api/v0/cluster_metadata": {"data": there},
    }
    with answering(answers) as address:
        assert "accepts unauthenticated requests; start it with RAY_AUTH_MODE=token" in refusal(
            address, tmp_path
        )
        told = refusal(address, tmp_path, "--insecure")
    assert f"has Ray 2.60.0, Python 3.9.1, this machine Ray {version('ray')}" in told
    with answering({}) as address:
        assert "accepts unauthenticated requests" in refusal(
            address, tmp_path
        )  # a Ray from before there were tokens


def test_an_address_where_no_cluster_is_is_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    assert f"no cluster answers at http://127.0.0.1:{port}" in refusal(f"http://127.0.0.1:{port}", tmp_path)
    assert "must be that of the cluster's dashboard" in refusal("auto", tmp_path)
    told = refusal("http://me:hunter2@127.0.0.1", tmp_path)
    assert "must not contain credentials" in told
    assert "hunter2" not in told
