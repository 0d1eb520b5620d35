"""Requests that a cluster cannot serve are reported in one line by the job of the study and leave no node."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_cluster
from tests.fake_cluster import Head, NodeType

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    types = {
        "small": NodeType(cpus=1, memory_gib=1, max_nodes=1),
        "gpu": NodeType(cpus=1, gpus=1, max_nodes=1),
    }
    with fake_cluster.head(types, idle_seconds=2) as head:
        yield head


def last_line_of_failed_study(cluster: Head, *study: object, cwd: Path) -> str:
    """Submit a study that must fail on the cluster and return the last line of its output."""
    submission = cluster.slimfront("submit", *study, cwd=cwd)
    assert submission.returncode == 1, submission.stdout + submission.stderr
    assert ": failed" in submission.stderr
    assert cluster.nodes() == []
    return submission.stdout.strip().splitlines()[-1]


def test_a_missing_bucket_is_reported_before_any_node_is_started(
    cluster: Head, study_file: Path, s3_server: str
) -> None:
    bucket = f"none-{uuid.uuid4().hex[:8]}"
    store = f"store=s3://{bucket}/team?endpoint={s3_server}"
    message = last_line_of_failed_study(cluster, study_file, store, "name=lost", cwd=study_file.parent)
    assert f"there is no bucket {bucket}" in message


def test_a_request_for_more_gpus_than_any_node_has_is_reported(
    cluster: Head, study_file: Path, s3_address: str
) -> None:
    options = [f"store={s3_address}", "name=large", "cluster.gpus=8"]
    message = last_line_of_failed_study(cluster, study_file, *options, cwd=study_file.parent)
    assert "no node that this cluster could have holds 1 CPU, 8 GPU" in message
    assert "slimfront resume large --address URL" in message
