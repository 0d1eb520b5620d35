"""The doctor's checks of machines, clusters and stores, good and bad."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster import doctor
from cluster.on_ray.jobs_api import Node

GIB = 2**30


def test_every_fact_has_a_name_and_a_value() -> None:
    facts = doctor.facts()
    assert {"processors", "memory", "ray", "gpus"} <= {fact.what for fact in facts}
    assert all(fact.what and fact.value for fact in facts)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (doctor.processors(2), doctor.processors(1)),
        (doctor.memory(8 * GIB), doctor.memory(GIB)),
        (doctor.shared_memory(GIB), doctor.shared_memory(64 * 2**20)),
        (doctor.disk(50 * GIB), doctor.disk(GIB)),
    ],
)
def test_too_little_of_something_comes_with_a_hint(good: doctor.Fact, bad: doctor.Fact) -> None:
    assert good.ok
    assert not bad.ok
    assert bad.hint


@pytest.mark.parametrize(
    ("script", "count"), [("echo 'GPU 0: A'; echo 'GPU 1: B'", 2), ("echo no driver; exit 9", 0), ("", 0)]
)
def test_gpus_are_counted_by_the_drivers_tool(
    script: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.gpus() == count


def test_without_the_drivers_tool_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor.gpus() == 0


def test_a_working_store_is_probed_and_left_unchanged(tmp_path: Path, s3_address: str, s3: Any) -> None:
    for address in (str(tmp_path / "runs"), s3_address):
        facts = {fact.what: fact for fact in doctor.of_store(address)}
        assert all(fact.ok for fact in facts.values()), facts
        assert "MB/s" in facts["put 8 MB"].value
        assert "MB/s" in facts["fetch them"].value
    assert not [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    bucket = s3_address.removeprefix("s3://").partition("/")[0]
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_a_missing_permission_is_named_and_other_operations_are_probed(s3_address: str, s3: Any) -> None:
    bucket = s3_address.removeprefix("s3://").partition("/")[0]
    denied = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]}))
    facts = {fact.what: fact for fact in doctor.of_store(s3_address)}
    assert "may not do s3:GetObject" in facts["all that a study does"].value
    assert "may not do s3:GetObject" in facts["read it"].value
    assert not facts["read it"].ok
    assert facts["list records"].ok
    assert facts["put 8 MB"].ok


@pytest.mark.parametrize("address", ["gs://bucket/prefix", "/proc/none"])
def test_an_invalid_store_is_one_line(address: str) -> None:
    (fact,) = doctor.of_store(address)
    assert not fact.ok


SCALING = """\
======== Autoscaler status: 2026-11-23 03:11:36.747975 ========
Node status
---------------------------------------------------------------
Active:
 1 head
Pending:
 10.0.0.7: gpu-spot, setting-up
Recent failures:
 gpu: InsufficientInstanceCapacity (latest_attempt: 03:11:01)

Resources
---------------------------------------------------------------
Pending Demands:
 {'GPU': 1.0}: 3+ pending tasks/actors
"""


def test_pending_nodes_failures_and_demands_of_an_autoscaler_are_reported() -> None:
    facts = {fact.what: fact for fact in doctor.autoscaler(SCALING)}
    assert facts["pending"].value == "10.0.0.7: gpu-spot, setting-up"
    assert facts["pending"].ok
    assert facts["recent failures"].value.startswith("gpu: InsufficientInstanceCapacity")
    assert not facts["recent failures"].ok
    assert facts["pending demands"].value == "{'GPU': 1.0}: 3+ pending tasks/actors"
    quiet = "Pending:\n (no pending nodes)\nRecent failures:\n (no failures)\nPending Demands:\n (no resource demands)"
    assert not list(doctor.autoscaler(quiet))


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (fact,) = doctor.of_cluster(f"http://127.0.0.1:{port}", insecure=False)
    assert not fact.ok
    assert "no cluster answers" in fact.value


def test_nodes_are_counted_by_type_and_a_head_that_runs_tasks_is_reported() -> None:
    head, worker = Node("", True, 4, 0, 16), Node("gpu-spot", False, 8, 1, 32)
    facts = {fact.what: fact.value for fact in doctor.nodes([head, worker, worker])}
    assert facts["nodes"] == "1 head (4 CPUs, 16 GiB); 2 gpu-spot (8 CPUs, 1 GPUs, 32 GiB)"
    assert facts["gpus"] == "2"
    assert facts["head"] == "runs tasks too"
    assert "head" not in {fact.what for fact in doctor.nodes([head])}
