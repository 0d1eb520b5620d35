"""The command as a person runs it: processes, exit codes, and a study on a real local Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.store import LocalStore
from jobs import families


def slimfront(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *map(str, args)]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": root}, check=False
    )


def test_a_wrong_study_exits_2_with_every_problem_and_no_traceback(study_file: Path) -> None:
    done = slimfront("validate", study_file, "search.candidats=3", "target.threads=0", cwd=study_file.parent)
    assert done.returncode == 2
    assert "command line search.candidats: got candidats" in done.stderr
    assert "command line target.threads: got 0, expected 1 to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (study_file.parent / "runs").exists()


def test_a_plan_runs_nothing(study_file: Path) -> None:
    done = slimfront("plan", study_file, cwd=study_file.parent)
    assert done.returncode == 0, done.stderr
    assert "5 candidates" in done.stdout
    assert "shared" in done.stdout
    assert "by shared steps" in done.stdout
    assert not list(study_file.parent.glob("runs/records/**/*.json"))


def test_techniques_are_listed_for_programs(tmp_path: Path) -> None:
    done = slimfront("techniques", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"drop_layers", "prune_ffn", "svd_llm", "rtn", "gptq", "distill"} <= set(listed)
    assert listed["gptq"]["needs"] == ["calibration"]
    assert listed["gptq"]["families"] == families.names()
    assert "2210.17323" in listed["gptq"]["paper"]


def test_one_technique_is_shown_with_its_options_and_what_it_refuses(tmp_path: Path) -> None:
    done = slimfront("techniques", "prune_hidden", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "share of the hidden width to remove" in done.stdout
    assert "Refuses gemma3_text: its norms after each layer" in done.stdout.replace("\n", " ")
    wrong = slimfront("techniques", "prune_hiden", cwd=tmp_path)
    assert wrong.returncode == 3
    assert "did you mean prune_hidden?" in wrong.stderr


@pytest.mark.parametrize("command", ["status", "front", "report", "resume"])
def test_a_folder_without_a_study_exits_3(tmp_path: Path, command: str) -> None:
    done = slimfront(command, tmp_path, cwd=tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_a_store_is_shown_and_trimmed(tmp_path: Path) -> None:
    kept = LocalStore(tmp_path / "runs")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 5000)
    ref = kept.put(tmp_path / "model")
    kept.commit("artifacts/01", dataclasses.asdict(ref))
    shown = slimfront("store", "runs", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "intermediate models" in shown.stdout
    assert "5.0 kB" in shown.stdout
    tried = slimfront("store", "runs", "--trim", "1kB", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(tried.stdout)["kinds"]["intermediates"]["removed_bytes"] == 5000
    assert kept.has(ref)
    trimmed = slimfront("store", "runs", "--trim", "1kB", cwd=tmp_path)
    assert trimmed.returncode == 0, trimmed.stderr
    assert not kept.has(ref)
    assert list(kept.records("")) == []
    kept.commit("results/01", {"recipe": {"steps": []}, "meters": [], "result": {"artifact": "a"}})
    assert slimfront("store", "runs", "--trim", "0", cwd=tmp_path).returncode == 1
    wrong = slimfront("store", "runs", "--trim", "lots", cwd=tmp_path)
    assert wrong.returncode == 3
    assert "give one like 5GB" in wrong.stderr
    missing = slimfront("store", "elsewhere", cwd=tmp_path)
    assert missing.returncode == 3
    assert "holds no store" in missing.stderr


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_study_on_ray_is_interrupted_killed_resumed_looked_at_and_exported(
    study_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs" / "tiny"
    command = [sys.executable, "-m", "orchestrator", "search", str(study_file)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def started_until(committed: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(list(tmp_path.glob("runs/records/results/*.json"))) < committed:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        return process

    stopped = started_until(1)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, said
    assert f"slimfront resume {runs}" in said
    assert "Traceback" not in said
    assert "stopped; resume goes on" in slimfront("status", runs, cwd=tmp_path).stdout

    killed = started_until(3)
    killed.kill()
    killed.wait()  # its pipes stay open for as long as Ray's idle agents, a minute
    for pipe in (killed.stdout, killed.stderr):
        assert pipe is not None
        pipe.close()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/records/results/*.json")}

    done = slimfront("resume", runs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Pareto front of tiny" in done.stdout
    assert "done" in slimfront("status", runs, cwd=tmp_path).stdout
    assert all(file.stat().st_mtime_ns == at for file, at in before.items())

    shown = json.loads(slimfront("front", runs, "--json", cwd=tmp_path).stdout)
    assert shown["study"] == "tiny"
    assert {"size_bytes", "accuracy"} <= set(shown["original"]["metrics"])
    assert (runs / "report.html").is_file()
    picked = shown["members"][0]["id"]
    exported = slimfront("export", runs, tmp_path / "out", "--pick", picked[:10], cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == shown["members"][0]["metrics"]["size_bytes"]


def test_a_clusters_files_are_written_and_checked(tmp_path: Path) -> None:
    done = slimfront("init", "--template", "aws", "--gpu", "A10G", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    wrong = slimfront("doctor", "--template", file, cwd=tmp_path)
    assert wrong.returncode == 2
    assert [line.partition(" ")[2] for line in wrong.stderr.splitlines()] == [
        "available_node_types.gpu-spot.min_worker: got min_worker, expected min_workers",
        "available_node_types.gpu-spot.resources.GPU: got 9, but a g5.2xlarge has 1 (no type has more than 8: "
        "g5.48xlarge)",
        "available_node_types.gpu.resources.GPU: got 9, but a g5.2xlarge has 1 (no type has more than 8: g5.48xlarge)",
    ]


def test_wrong_choices_of_a_cluster_exit_2_and_write_nothing(tmp_path: Path) -> None:
    done = slimfront("init", "--template", "gcp", "--gpu", "L5", "here", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu: got L5, expected one of A100, H100, L4, T4",
        "project: got nothing, expected the id of a project of Google Cloud",
    ]
    assert not (tmp_path / "here").exists()
