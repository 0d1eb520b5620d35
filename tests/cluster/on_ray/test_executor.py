"""RayExecutor on a real Ray of this machine: warm workers, killed tasks, killed drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.executors.executor import NodeType, Resources
from cluster.executors.task import TaskResult
from cluster.on_ray.connection import connect
from cluster.on_ray.executor import RayExecutor, call_error
from cluster.on_ray.nodes import node_type

pytestmark = pytest.mark.ray

# A program that runs tasks on a Ray of its own until it is stopped. Each task records its pid.
DRIVER = """
import signal
import sys
from pathlib import Path
from cluster.executors.executor import Resources
from cluster.on_ray.executor import RayExecutor

def busy(folder):
    import os, time
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

def main():
    # A shell starts background processes with SIGINT ignored, which this program would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    executor = RayExecutor(slots=2)
    try:
        for key in "ab":
            executor.submit(key, busy, sys.argv[1], resources=Resources())
        executor.wait()
    except KeyboardInterrupt:
        executor.submit("one more", abs, -1, resources=Resources())
        executor.cancel("a")
        executor.cancel("b")
        print(executor.wait(60)[0].value)
    finally:
        executor.close()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    ray, started = connect(None, slots=4, gpus=0)
    yield
    if started:
        ray.shutdown()


@pytest.fixture
def executor(one_ray: None) -> Iterator[RayExecutor]:
    with closing(RayExecutor(slots=2)) as ray_executor:
        yield ray_executor


class Times:
    """A function that counts how often it was pickled in this process."""

    def __init__(self, factor: int) -> None:
        self.factor, self.pickled = factor, 0

    def __reduce__(self) -> tuple[type[Times], tuple[int]]:
        self.pickled += 1
        return Times, (self.factor,)

    def __call__(self, value: int) -> int:
        return self.factor * value


def remember(value: int) -> tuple[int, Any]:
    """Return this process, and the value of the previous call in it."""
    previous = getattr(sys, "_remembered", None)
    sys._remembered = value  # type: ignore[attr-defined]
    return os.getpid(), previous


def threads() -> str | None:
    return os.environ.get("OPENBLAS_NUM_THREADS")


def touch_and_sleep(file: Path, seconds: float) -> int:
    file.write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def until(holds: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.02)


@contextmanager
def driver(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run DRIVER; its workers write to `folder`, and it writes to a log file next to the folder.

    The log is not a pipe, which a descendant might hold open.
    """
    folder.mkdir()
    with (
        log_of(folder).open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


def workers_of(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_worker_stays_warm_from_task_to_task(one_ray: None) -> None:
    with closing(RayExecutor(slots=1)) as executor:
        answers = []
        for value in range(3):
            executor.submit("a", remember, value, resources=Resources())
            answers.append(executor.wait(60)[0].value)
    assert len({pid for pid, _ in answers}) == 1
    assert [previous for _, previous in answers] == [None, 0, 1]


def test_all_slots_are_used(executor: RayExecutor, tmp_path: Path) -> None:
    for key in "ab":
        executor.submit(key, touch_and_sleep, tmp_path / key, 600, resources=Resources())
    until(lambda: all((tmp_path / key).exists() for key in "ab"))
    for key in "ab":
        executor.cancel(key)


def test_tasks_start_while_the_caller_does_not_wait(executor: RayExecutor, tmp_path: Path) -> None:
    for key in "abcd":
        executor.submit(key, touch_and_sleep, tmp_path / key, 0, resources=Resources())
    until(lambda: all((tmp_path / key).exists() for key in "abcd"))


def test_a_running_task_that_is_cancelled_is_killed_and_its_slot_is_used_again(
    executor: RayExecutor, tmp_path: Path
) -> None:
    executor.submit("a", touch_and_sleep, tmp_path / "pid", 600, resources=Resources())
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    executor.cancel("a")
    assert executor.wait() == []
    # An exclusive task starts only when the cancelled one no longer counts, and its process has ended by then.
    executor.submit("a", os.getpid, resources=Resources(exclusive=True))
    (result,) = executor.wait(60)
    assert result.error is None
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_worker_computes_with_one_thread_by_default(one_ray: None) -> None:
    for env, expected in ((None, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")):
        with closing(RayExecutor(slots=1, env=env)) as executor:
            executor.submit("a", threads, resources=Resources())
            assert executor.wait(60) == [TaskResult("a", expected)]


def test_a_ray_that_this_executor_did_not_start_is_left_running(one_ray: None) -> None:
    RayExecutor(slots=1).close()
    with closing(RayExecutor(slots=1)) as executor:
        executor.submit("a", abs, -1, resources=Resources())
        assert executor.wait(60) == [TaskResult("a", 1)]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ({"instance": "g6.2xlarge", "region": "us-east-1", "market": "spot", "gpu": "L4", "ray.io/node-group": "gpu"},
         NodeType("g6.2xlarge", "us-east-1", spot=True)),
        ({"instance": "m7i.large", "region": "us-east-1", "market": "on-demand"}, NodeType("m7i.large", "us-east-1")),
        ({"ray.io/node-group": "gpu-workers", "ray.io/availability-region": "eu-west-1", "ray.io/market-type": "spot"},
         NodeType("gpu-workers", "eu-west-1", spot=True)),
        ({"ray.io/node-id": "ab12"}, NodeType()),
    ],
)  # fmt: skip
def test_the_type_of_a_node_follows_from_its_labels(labels: dict[str, str], kind: NodeType) -> None:
    assert node_type(labels) == kind


def test_losing_a_worker_prints_nothing(executor: RayExecutor, capfd: pytest.CaptureFixture[str]) -> None:
    executor.submit("a", os._exit, 1, resources=Resources())
    (result,) = executor.wait(60)
    assert result.error
    time.sleep(0.5)
    assert capfd.readouterr() == ("", "")


def test_after_a_kill_the_same_program_starts_at_once_and_ends_quietly_on_ctrl_c(tmp_path: Path) -> None:
    with driver(tmp_path / "killed") as killed:
        until(lambda: len(workers_of(tmp_path / "killed")) == 2)
        killed.kill()
        killed.wait(60)
        until(lambda: all(map(has_ended, workers_of(tmp_path / "killed"))), seconds=10)

    again = tmp_path / "again"
    with driver(again) as running:
        until(lambda: len(workers_of(again)) == 2)
        processes = psutil.Process(running.pid).children(recursive=True)
        os.killpg(running.pid, signal.SIGINT)
        # Longer than its own time limit: if that runs out, the log contains the reason.
        until(lambda: running.poll() is not None, seconds=100)
        assert (running.returncode, log_of(again).read_text()) == (0, "1\n")
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert alive == []


def test_the_loss_of_a_node_is_distinguished_from_a_failed_task(one_ray: None) -> None:
    from ray import exceptions

    dead = exceptions.RayActorError(error_msg="The actor died because its node has died. Node Id: 1")
    drained = exceptions.RayActorError(error_msg="gone", preempted=True)
    unreachable = exceptions.ActorUnavailableError("no connection", None)
    assert all(call_error("a", error).preempted for error in (dead, drained, unreachable))
    crashed = call_error("a", exceptions.ActorDiedError())
    assert not crashed.preempted
    assert crashed.error
    assert crashed.error.startswith("ActorDiedError: ")


def test_a_function_is_pickled_once_and_each_task_runs_its_own(executor: RayExecutor) -> None:
    twice, thrice = Times(2), Times(3)
    values = {}
    for round, function in enumerate([twice, twice, twice, thrice, thrice, twice]):
        for value in (1, 10):
            executor.submit(f"{round} {value}", function, value, resources=Resources())
        values |= {result.key: result.value for _ in (1, 2) for result in executor.wait(60)}
    values |= {result.key: result.value for result in executor.wait(60)}
    assert [values[f"{round} 10"] for round in range(6)] == [20, 20, 20, 30, 30, 20]
    assert [values[f"{round} 1"] for round in range(6)] == [2, 2, 2, 3, 3, 2]
    # A function is pickled again only after another one.
    assert (twice.pickled, thrice.pickled) == (2, 1)
