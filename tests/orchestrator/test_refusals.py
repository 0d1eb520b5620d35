"""What a cluster can't do is told in one line by the job itself, and leaves no node and no process behind."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_cluster
from tests.fake_cluster import Head, NodeType

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with fake_cluster.head({"small": NodeType(cpus=1, memory_gib=1, most=1)}, idle_seconds=2) as found:
        yield found


def last_line(cluster: Head, *study: object, cwd: Path) -> str:
    """What a study that was submitted ends with: the one line that is not told by Ray or by progress."""
    done = cluster.slimfront("submit", *study, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ": failed" in done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_bucket_that_is_not_there_is_named_and_no_node_is_started(
    cluster: Head, study_file: Path, s3_server: str
) -> None:
    bucket = f"none-{uuid.uuid4().hex[:8]}"
    store = f"s3://{bucket}/team?endpoint={s3_server}"
    told = last_line(cluster, study_file, f"store={store}", "name=lost", cwd=study_file.parent)
    assert bucket in told
    assert cluster.nodes() == []


def test_what_needs_more_memory_than_any_node_has_is_told_with_what_there_is(
    cluster: Head, study_file: Path, s3_address: str
) -> None:
    told = last_line(cluster, study_file, f"store={s3_address}", "name=large", cwd=study_file.parent)
    assert "no node that this cluster could start holds" in told
    assert "1 GiB" in told
    assert cluster.nodes() == []


def test_more_gpus_than_any_node_has_are_refused_in_one_line(cluster: Head) -> None:
    body = """
from contextlib import closing
from cluster.executor import Resources
from cluster.on_ray import RayExecutor
with closing(RayExecutor()) as executor:
    try:
        executor.submit("a", abs, -1, resources=Resources(gpus=8))
        executor.wait(120)
    except (RuntimeError, ValueError) as error:
        print(error)
"""
    env = {**cluster.env, "RAY_ADDRESS": cluster.gcs}
    done = subprocess.run([sys.executable, "-c", body], env=env, capture_output=True, text=True, check=True)
    assert "8 GPU" in done.stdout
    assert done.stdout.count("\n") == 1
