"""What a cluster can't do is told in one line by the study's job, and leaves no node behind."""

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
    with fake_cluster.head(types, idle_seconds=2) as found:
        yield found


def failing(cluster: Head, *study: object, cwd: Path) -> str:
    """The last line that a study writes which fails on the cluster."""
    done = cluster.slimfront("submit", *study, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ": failed" in done.stderr
    assert cluster.nodes() == []
    return done.stdout.strip().splitlines()[-1]


def test_a_bucket_that_is_not_there_is_named_before_any_node_is_started(
    cluster: Head, study_file: Path, s3_server: str
) -> None:
    bucket = f"none-{uuid.uuid4().hex[:8]}"
    store = f"store=s3://{bucket}/team?endpoint={s3_server}"
    told = failing(cluster, study_file, store, "name=lost", cwd=study_file.parent)
    assert f"there is no bucket {bucket}" in told


def test_more_gpus_than_any_node_has_are_told_with_what_there_is(
    cluster: Head, study_file: Path, s3_address: str
) -> None:
    many = [f"store={s3_address}", "name=large", "cluster.gpus=8"]
    told = failing(cluster, study_file, *many, cwd=study_file.parent)
    assert "no node that this cluster could have holds 1 CPU, 8 GPU" in told
    assert "slimfront resume large --address URL" in told
