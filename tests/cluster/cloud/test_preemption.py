"""Notices of a machine's end, from each source."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cloud import preemption
from cluster.cloud.preemption import Notice, latest_notice, metadata_service, watch
from tests.cluster.clouds import Ec2, served


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ec2]:
    answers = Ec2()
    with served(answers) as address:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{address}/")
        monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
        # A proxy that does not exist: no request may use it.
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        yield answers


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Poll often, and restore the environment."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("SLIMFRONT_NOTICE", "")
    monkeypatch.delenv("SLIMFRONT_NOTICE")


def wait_for_notice(seconds: float = 10) -> Notice | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and latest_notice() is None:
        time.sleep(0.01)
    return latest_notice()


def ask() -> Notice | None:
    return latest_notice()


def test_a_notice_of_ec2_reaches_this_process_and_its_children_with_its_time(
    ec2: Ec2,
) -> None:
    assert latest_notice() is None
    announced: list[Notice] = []
    watch(announce=announced.append)
    time.sleep(0.2)
    assert latest_notice() is None
    assert len(ec2.tokens) > 1, "EC2 was not polled"
    ends_at = ec2.take_away(120)
    notice = wait_for_notice()
    assert notice == Notice("EC2 (terminate)", ends_at)
    assert 110 < (notice.seconds_left or 0) <= 120
    while not announced:
        time.sleep(0.01)
    assert announced == [notice]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ask) == notice


@pytest.mark.parametrize(
    "answer", ["", "[]", "<html>hello</html>", '{"action": "stop"}', '{"action": 1, "time": 2}']
)
def test_an_answer_of_ec2_that_is_no_notice_is_ignored(ec2: Ec2, answer: str) -> None:
    source = metadata_service()
    assert source is not None
    ec2.action = answer
    assert source() is None


def test_a_notice_of_gce_is_the_flag_true(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = ["FALSE"]

    def answers(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, ""
        return (200, flag[0]) if headers.get("metadata-flavor") == "Google" else (403, "")

    with served(answers, {"Metadata-Flavor": "Google"}) as address:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
        monkeypatch.setenv("GCE_METADATA_HOST", address.removeprefix("http://"))
        source = metadata_service()
        assert source is not None
        assert source() is None
        flag[0] = "TRUE"
        notice = source()
    assert notice is not None
    assert notice.source == "GCE"
    assert 25 < (notice.seconds_left or 0) <= 30
    # A service that does not answer for a moment gives no notice.
    assert source() is None


def test_without_a_cloud_nothing_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []

    def answers(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        paths.append(path)
        return 404, ""

    with served(answers) as address:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
        monkeypatch.setenv("GCE_METADATA_HOST", address.removeprefix("http://"))
        assert metadata_service() is None
        paths.clear()
        watch()
        time.sleep(0.5)
        assert len(paths) == 2
        assert not any(thread.name == "slimfront-preempt" for thread in threading.enumerate())
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert metadata_service() is None
        assert len(paths) == 3


def test_a_notice_of_another_source_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "no address")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    answers = iter([None, None, Notice("Ray"), Notice("late")])
    watch([lambda: next(answers)])
    notice = wait_for_notice()
    assert notice == Notice("Ray")
    assert notice.seconds_left is None
    assert list(answers) == [Notice("late")]
