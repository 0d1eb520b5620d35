"""What every executor promises. One is found here as soon as its class is in a module of `cluster`."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import executors, on_ray
from cluster.executors.executor import Executor, NodeType, Resources
from cluster.executors.inline import InlineExecutor
from cluster.executors.task import TaskResult
from cluster.on_ray.connection import connect
from cluster.on_ray.executor import RayExecutor

# Two slots and 8 GiB each, whatever the machine has.
FACTORIES: dict[str, Callable[[], Executor]] = {
    "InlineExecutor": lambda: InlineExecutor(slots=2, memory_gib=8),
    "RayExecutor": lambda: RayExecutor(slots=2, memory_gib=8),
}
IN_PROCESSES = {"RayExecutor"}


def implementations() -> dict[str, type]:
    methods = [name for name, member in vars(Executor).items() if callable(member) and name[0] != "_"]
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for package in (executors, on_ray)
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name: found
        for module in modules
        for name, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__
        and found is not Executor
        and all(callable(getattr(found, method, None)) for method in methods)
    }  # fmt: skip


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.ray) if "Ray" in name else name


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """A Ray that all executors share; starting one takes seconds."""
    ray, started = connect(None, slots=4, gpus=0)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="module", params=[marked(name) for name in sorted(FACTORIES)])
def kind(request: pytest.FixtureRequest) -> str:
    if "Ray" in request.param:
        request.getfixturevalue("one_ray")
    return str(request.param)


@pytest.fixture(scope="module")
def shared(kind: str) -> Iterator[Executor]:
    with closing(FACTORIES[kind]()) as made:
        yield made


@pytest.fixture
def executor(shared: Executor) -> Iterator[Executor]:
    """An executor with nothing under way, before and after."""
    yield shared
    while shared.wait(30):
        pass


@pytest.fixture
def in_processes(kind: str) -> None:
    if kind not in IN_PROCESSES:
        pytest.skip("its work runs in the caller's process")


def spend(folder: Path, name: str, seconds: float = 0.2) -> str:
    """A piece of work that leaves behind when it ran."""
    start = time.monotonic()
    time.sleep(seconds)
    (folder / name).write_text(f"{start} {time.monotonic()}")
    return name


def fail() -> None:
    raise ValueError("boom")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unpicklable() -> Any:
    return sys._getframe()


def meet(folder: Path) -> list[str] | None:
    """What each rank of a gang left behind, told by the first once all have; each waits for all others."""
    rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    (folder / rank).write_text(f"{rank} of {ranks}")
    while sum(file.stat().st_size > 0 for file in folder.iterdir()) < ranks:
        time.sleep(0.01)
    return [file.read_text() for file in sorted(folder.iterdir())] if rank == "0" else None


def lose_the_last(folder: Path) -> None:
    """One rank dies as soon as the other one is there, which would go on for ever."""
    first = folder / "0"
    if os.environ["RANK"] == "0":
        first.with_name("new").write_text(str(os.getpid()))
        first.with_name("new").rename(first)
        time.sleep(600)
    while not first.exists():
        time.sleep(0.01)
    die()


def until_gone(pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.05)


def spans(folder: Path) -> dict[str, tuple[float, float]]:
    times = {file.name: file.read_text().split() for file in folder.iterdir()}
    return {name: (float(start), float(end)) for name, (start, end) in times.items()}


def most_at_once(spans: dict[str, tuple[float, float]]) -> int:
    return max(sum(start <= moment < end for start, end in spans.values()) for moment, _ in spans.values())


def all_of(executor: Executor) -> list[TaskResult]:
    """Everything that ends, until nothing is under way."""
    ended: list[TaskResult] = []
    while some := executor.wait(60):
        ended += some
    return ended


def test_the_node_that_this_runs_on_is_up_and_priced_by_nobody(executor: Executor) -> None:
    assert dict(executor.nodes()) == {NodeType(): 1}


def test_every_executor_is_tested_here() -> None:
    assert set(implementations()) == set(FACTORIES)


def test_every_piece_ends_exactly_once_with_its_value(executor: Executor) -> None:
    for number in range(10):
        executor.submit(f"piece-{number}", pow, number, 2, resources=Resources())
    ended = all_of(executor)
    assert sorted(one.key for one in ended) == sorted(f"piece-{number}" for number in range(10))
    assert {one.key: one.value for one in ended} == {f"piece-{n}": n**2 for n in range(10)}
    assert not any(one.error for one in ended)


def test_nothing_under_way_means_nothing_to_wait_for(executor: Executor) -> None:
    assert executor.wait() == []


def test_an_exception_that_escapes_comes_back_as_lost(executor: Executor) -> None:
    executor.submit("a", fail, resources=Resources())
    (ended,) = all_of(executor)
    assert ended.error is not None
    assert ended.error.splitlines()[0] == "ValueError: boom"
    assert "in fail" in ended.error
    assert not ended.preempted
    assert ended.value is None


def test_work_that_exits_comes_back_as_lost_and_the_executor_goes_on(executor: Executor) -> None:
    executor.submit("a", sys.exit, 3, resources=Resources())
    (ended,) = all_of(executor)
    assert ended.error is not None
    executor.submit("b", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("b", 1)]


def test_at_most_as_many_pieces_as_slots_run_at_once(executor: Executor, tmp_path: Path) -> None:
    for name in "abcdef":
        executor.submit(name, spend, tmp_path, name, resources=Resources())
    assert len(all_of(executor)) == 6
    assert most_at_once(spans(tmp_path)) <= executor.slots


def test_exclusive_work_waits_for_the_rest_and_then_runs_alone(executor: Executor, tmp_path: Path) -> None:
    for name in ("a", "only-1", "b", "only-2", "c"):
        exclusive = Resources(exclusive=name.startswith("only"))
        executor.submit(name, spend, tmp_path, name, resources=exclusive)
    assert len(all_of(executor)) == 5
    ran = spans(tmp_path)
    others_end = max(ran[name][1] for name in "abc")
    assert others_end <= ran["only-1"][0]
    assert ran["only-1"][1] <= ran["only-2"][0]


def test_other_work_is_held_back_while_exclusive_work_runs(executor: Executor, tmp_path: Path) -> None:
    executor.submit("only", spend, tmp_path, "only", 0.5, resources=Resources(exclusive=True))
    executor.wait(0.2)
    executor.submit("a", spend, tmp_path, "a", resources=Resources())
    all_of(executor)
    ran = spans(tmp_path)
    assert ran["only"][1] <= ran["a"][0]


def test_pieces_that_need_too_much_memory_together_run_apart(executor: Executor, tmp_path: Path) -> None:
    for name in "abc":
        executor.submit(name, spend, tmp_path, name, resources=Resources(memory_gib=5))
    assert len(all_of(executor)) == 3
    assert most_at_once(spans(tmp_path)) == 1


def test_what_can_never_be_had_is_refused_and_leaves_no_trace(executor: Executor) -> None:
    for resources in (
        Resources(memory_gib=9), Resources(cpus=1e6), Resources(cpus=-1), Resources(gpus=100), Resources(ranks=3)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is not available here"):
            executor.submit("a", abs, -1, resources=resources)
    assert executor.wait() == []
    executor.submit("a", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]


def test_a_gang_runs_at_once_and_its_first_rank_tells_the_value(executor: Executor, tmp_path: Path) -> None:
    executor.submit("gang", meet, tmp_path, resources=Resources(ranks=2))
    executor.submit("a", abs, -1, resources=Resources())
    ended = {one.key: one for one in all_of(executor)}
    assert ended == {"gang": TaskResult("gang", ["0 of 2", "1 of 2"]), "a": TaskResult("a", 1)}


def test_gangs_that_could_each_take_half_of_the_slots_both_run(executor: Executor, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        executor.submit(name, meet, tmp_path / name, resources=Resources(ranks=2))
    assert [one.error or one.value for one in all_of(executor)] == [["0 of 2", "1 of 2"]] * 3


def test_a_gang_that_loses_a_rank_is_lost_once_with_all_its_ranks(executor: Executor, tmp_path: Path) -> None:
    executor.submit("gang", lose_the_last, tmp_path, resources=Resources(ranks=2))
    (ended,) = all_of(executor)
    assert ended.error
    until_gone(int((tmp_path / "0").read_text()))
    executor.submit("a", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]


def test_a_key_is_refused_while_it_is_under_way_and_free_again_after(executor: Executor) -> None:
    executor.submit("a", abs, -1, resources=Resources())
    with pytest.raises(ValueError, match="a is pending already"):
        executor.submit("a", abs, -2, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]
    executor.submit("a", abs, -3, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 3)]


def test_cancelled_work_is_not_reported_and_its_key_is_free_at_once(
    executor: Executor, tmp_path: Path
) -> None:
    for name in "abcd":
        executor.submit(name, spend, tmp_path, name, resources=Resources())
    executor.cancel("a")
    executor.cancel("d")
    executor.cancel("unheard of")
    executor.submit("d", abs, -1, resources=Resources())
    ended = {one.key: one.value for one in all_of(executor)}
    assert ended == {"b": "b", "c": "c", "d": 1}
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "d").exists()


def test_an_executor_closes_twice_and_then_takes_no_more_work(kind: str) -> None:
    executor = FACTORIES[kind]()
    executor.submit("a", time.sleep, 0.1, resources=Resources())
    executor.close()
    executor.close()
    assert executor.wait() == []
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit("b", abs, -1, resources=Resources())


@pytest.mark.usefixtures("in_processes")
def test_a_killed_worker_loses_its_piece_only(executor: Executor) -> None:
    for name in "abcd":
        executor.submit(name, *((die,) if name == "b" else (abs, -1)), resources=Resources())
    ended = {one.key: one for one in all_of(executor)}
    assert ended.pop("b").error
    assert ended == {name: TaskResult(name, 1) for name in "acd"}


@pytest.mark.usefixtures("in_processes")
def test_what_does_not_pickle_is_lost_and_the_executor_goes_on(executor: Executor) -> None:
    executor.submit("result", unpicklable, resources=Resources())
    executor.submit("argument", id, sys._getframe(), resources=Resources())
    executor.submit("fine", abs, -1, resources=Resources())
    ended = {one.key: one for one in all_of(executor)}
    assert ended["result"].error
    assert ended["argument"].error
    assert ended["fine"].value == 1


@pytest.mark.usefixtures("in_processes")
def test_waiting_ends_with_its_time_and_loses_nothing(executor: Executor) -> None:
    executor.submit("a", time.sleep, 1.0, resources=Resources())
    assert executor.wait(0.05) == []
    assert all_of(executor) == [TaskResult("a")]
