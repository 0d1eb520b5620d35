"""A gang's ranks run at once, each in a fresh process; the gang has one result and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.executors.gang import Rank, RankProcess, free_port, run_gang, run_rank
from cluster.executors.task import TaskResult

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def environment() -> tuple[int, list[str | None]]:
    return os.getpid(), [os.environ.get(name) for name in NAMES]


def meet(folder: Path) -> str:
    """Wait for the other rank: if the ranks ran one after another, this would fail."""
    rank = os.environ["RANK"]
    (folder / rank).write_text(str(os.getpid()))
    deadline = time.monotonic() + 30
    while len([file for file in folder.iterdir() if file.stat().st_size]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return rank


def sleep_unless_last(folder: Path) -> None:
    if meet(folder) == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def fail_if_last(folder: Path) -> None:
    if meet(folder) == "1":
        raise ValueError("boom")
    time.sleep(300)


def sleep_with_name(folder: Path) -> None:
    draft = folder / "draft"
    draft.write_text(str(os.getpid()))
    draft.rename(folder / "pid")
    time.sleep(300)


def appears(file: Path) -> str:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file.read_text()


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def rank_of_four(rank: int = 0) -> Rank:
    return Rank(rank, 4, rank % 2, "10.0.0.1", 29500)


def test_a_rank_has_the_environment_of_torch_distributed_in_a_fresh_process() -> None:
    result = run_rank("a", environment, (), rank_of_four(3))
    assert result.error is None
    pid, names = result.value
    assert names == ["3", "4", "1", "10.0.0.1"]
    assert pid != os.getpid()
    assert not any(name in os.environ for name in NAMES)


def test_a_function_that_no_module_contains_is_pickled_by_value() -> None:
    factor = 3
    module: dict[str, Any] = {"__name__": "__main__"}
    exec("def double(x):\n    return 2 * x", module)
    assert run_rank("a", lambda x: factor * x, (2,), rank_of_four()) == TaskResult("a", 6)
    assert run_rank("a", module["double"], (2,), rank_of_four()) == TaskResult("a", 4)


def leave() -> None:
    os._exit(3)


def frame() -> Any:
    return sys._getframe()


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (fail_if_last, "TypeError"),
        (leave, "rank 0 of 4 exited with 3"),
        (frame, "its value does not pickle"),
    ],
)
def test_a_failure_of_a_rank_is_returned_as_an_error(fn: Callable[..., Any], why: str) -> None:
    result = run_rank("a", fn, (), rank_of_four())
    assert result.error is not None
    assert why in result.error.splitlines()[0]


def test_arguments_that_do_not_pickle_are_an_error_before_the_start() -> None:
    result = run_rank("a", id, (sys._getframe(),), rank_of_four())
    assert result.error is not None
    assert "does not pickle" in result.error


def first_returns(folder: Path) -> str | None:
    return "first" if meet(folder) == "0" else None


def last_sleeps(folder: Path) -> str | None:
    if meet(folder) == "1":
        time.sleep(300)
    return "first"


def last_returns(folder: Path) -> str | None:
    if meet(folder) == "0":
        time.sleep(300)
    return "last"


@pytest.mark.parametrize(
    ("fn", "value"), [(first_returns, "first"), (last_sleeps, "first"), (last_returns, "last")]
)
def test_ranks_run_at_once_and_the_first_result_that_decides_the_task_ends_them(
    fn: Callable[..., Any], value: str, tmp_path: Path
) -> None:
    assert run_gang("a", fn, (tmp_path,), 2) == TaskResult("a", value)
    assert all(has_ended(int(file.read_text())) for file in tmp_path.iterdir())
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize(
    ("fn", "why"),
    [(sleep_unless_last, "rank 1 of 2 was killed by SIGKILL"), (fail_if_last, "ValueError: boom")],
)
def test_a_failed_rank_ends_the_others_and_the_gang_has_one_error(
    fn: Callable[..., Any], why: str, tmp_path: Path
) -> None:
    result = run_gang("a", fn, (tmp_path,), 2)
    assert result.error is not None
    assert result.error.splitlines()[0] == why
    assert has_ended(int((tmp_path / "0").read_text()))


def test_a_running_rank_is_killed_from_another_thread(tmp_path: Path) -> None:
    results: list[TaskResult] = []
    with RankProcess("a", sleep_with_name, (tmp_path,), rank_of_four()) as process:
        waiting = threading.Thread(target=lambda: results.append(process.result()))
        waiting.start()
        pid = int(appears(tmp_path / "pid"))
        process.kill()
        waiting.join(10)
    assert results[0].error == "rank 0 of 4 was killed by SIGKILL"
    assert has_ended(pid)


def test_a_rank_that_was_killed_before_it_started_never_starts(tmp_path: Path) -> None:
    process = RankProcess("a", sleep_with_name, (tmp_path,), rank_of_four())
    process.kill()
    assert process.result().error == "rank 0 of 4 was killed before it started"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_rank_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, time; from cluster.executors.gang import run_gang\n"
        "def work(folder):\n"
        "    import os\n"
        "    (folder / os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
        "run_gang('a', work, (pathlib.Path(sys.argv[1]),), 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as parent:
        deadline = time.monotonic() + 30
        while sum(bool(file.read_text()) for file in tmp_path.iterdir()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.kill()
    assert all(has_ended(int(file.read_text())) for file in tmp_path.iterdir())


def test_a_free_port_can_be_listened_on() -> None:
    assert 1024 <= free_port() < 65536
