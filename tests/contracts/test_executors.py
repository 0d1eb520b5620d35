"""The contract of every executor. A new class in a module of `cluster` is tested here automatically."""

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
    classes: dict[str, type] = {}
    for module in modules:
        for name, candidate in inspect.getmembers(module, inspect.isclass):
            is_defined_there = candidate.__module__ == module.__name__ and candidate is not Executor
            if is_defined_there and has_methods(candidate, methods):
                classes[name] = candidate
    return classes


def has_methods(candidate: type, methods: list[str]) -> bool:
    return all(callable(getattr(candidate, method, None)) for method in methods)


def marked(name: str) -> Any:
    if "Ray" in name:
        return pytest.param(name, marks=pytest.mark.ray)
    return name


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """A Ray for all executors of the session; its start takes seconds."""
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
    with closing(FACTORIES[kind]()) as executor:
        yield executor


@pytest.fixture
def executor(shared: Executor) -> Iterator[Executor]:
    """An executor without pending tasks, before and after the test."""
    yield shared
    while shared.wait(30):
        pass


@pytest.fixture
def in_processes(kind: str) -> None:
    if kind not in IN_PROCESSES:
        pytest.skip("its tasks run in the caller's process")


def spend(folder: Path, name: str, seconds: float = 0.2) -> str:
    """A task that records when it ran."""
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
    """Write a file for each rank of a gang, and wait for those of all ranks; the first rank returns their contents."""
    rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    (folder / rank).write_text(f"{rank} of {ranks}")
    while sum(file.stat().st_size > 0 for file in folder.iterdir()) < ranks:
        time.sleep(0.01)
    if rank != "0":
        return None
    return [file.read_text() for file in sorted(folder.iterdir())]


def lose_the_last(folder: Path) -> None:
    """One rank dies as soon as the other one runs, which would never end."""
    first = folder / "0"
    if os.environ["RANK"] == "0":
        first.with_name("new").write_text(str(os.getpid()))
        first.with_name("new").rename(first)
        time.sleep(600)
    while not first.exists():
        time.sleep(0.01)
    die()


def wait_for_end(pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.05)


def spans(folder: Path) -> dict[str, tuple[float, float]]:
    times = {file.name: file.read_text().split() for file in folder.iterdir()}
    return {name: (float(start), float(end)) for name, (start, end) in times.items()}


def max_concurrency(spans: dict[str, tuple[float, float]]) -> int:
    concurrency = 0
    for moment, _ in spans.values():
        concurrency = max(concurrency, sum(start <= moment < end for start, end in spans.values()))
    return concurrency


def all_of(executor: Executor) -> list[TaskResult]:
    """Return all results, until no task is pending."""
    results: list[TaskResult] = []
    while new := executor.wait(60):
        results += new
    return results


def test_this_machine_is_the_only_node_and_has_no_price(executor: Executor) -> None:
    assert dict(executor.nodes()) == {NodeType(): 1}


def test_every_executor_is_tested_here() -> None:
    assert set(implementations()) == set(FACTORIES)


def test_every_task_ends_exactly_once_with_its_value(executor: Executor) -> None:
    for number in range(10):
        executor.submit(f"task-{number}", pow, number, 2, resources=Resources())
    ended = all_of(executor)
    assert sorted(result.key for result in ended) == sorted(f"task-{number}" for number in range(10))
    assert {result.key: result.value for result in ended} == {f"task-{n}": n**2 for n in range(10)}
    assert not any(result.error for result in ended)


def test_waiting_returns_at_once_without_pending_tasks(executor: Executor) -> None:
    assert executor.wait() == []


def test_an_escaping_exception_is_returned_as_an_error(executor: Executor) -> None:
    executor.submit("a", fail, resources=Resources())
    (ended,) = all_of(executor)
    assert ended.error is not None
    assert ended.error.splitlines()[0] == "ValueError: boom"
    assert "in fail" in ended.error
    assert not ended.preempted
    assert ended.value is None


def test_a_task_that_exits_is_returned_as_an_error_and_the_executor_continues(executor: Executor) -> None:
    executor.submit("a", sys.exit, 3, resources=Resources())
    (ended,) = all_of(executor)
    assert ended.error is not None
    executor.submit("b", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("b", 1)]


def test_at_most_as_many_tasks_as_slots_run_at_once(executor: Executor, tmp_path: Path) -> None:
    for name in "abcdef":
        executor.submit(name, spend, tmp_path, name, resources=Resources())
    assert len(all_of(executor)) == 6
    assert max_concurrency(spans(tmp_path)) <= executor.slots


def test_exclusive_tasks_wait_for_the_others_and_then_run_alone(executor: Executor, tmp_path: Path) -> None:
    for name in ("a", "only-1", "b", "only-2", "c"):
        exclusive = Resources(exclusive=name.startswith("only"))
        executor.submit(name, spend, tmp_path, name, resources=exclusive)
    assert len(all_of(executor)) == 5
    ran = spans(tmp_path)
    others_end = max(ran[name][1] for name in "abc")
    assert others_end <= ran["only-1"][0]
    assert ran["only-1"][1] <= ran["only-2"][0]


def test_other_tasks_wait_while_an_exclusive_task_runs(executor: Executor, tmp_path: Path) -> None:
    executor.submit("only", spend, tmp_path, "only", 0.5, resources=Resources(exclusive=True))
    executor.wait(0.2)
    executor.submit("a", spend, tmp_path, "a", resources=Resources())
    all_of(executor)
    ran = spans(tmp_path)
    assert ran["only"][1] <= ran["a"][0]


def test_tasks_that_together_need_too_much_memory_run_one_after_another(
    executor: Executor, tmp_path: Path
) -> None:
    for name in "abc":
        executor.submit(name, spend, tmp_path, name, resources=Resources(memory_gib=5))
    assert len(all_of(executor)) == 3
    assert max_concurrency(spans(tmp_path)) == 1


def test_resources_that_can_never_be_provided_are_refused_without_effect(executor: Executor) -> None:
    for resources in (
        Resources(memory_gib=9), Resources(cpus=1e6), Resources(cpus=-1), Resources(gpus=100), Resources(ranks=3)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is not available here"):
            executor.submit("a", abs, -1, resources=resources)
    assert executor.wait() == []
    executor.submit("a", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]


def test_the_ranks_of_a_gang_run_at_once_and_the_first_returns_the_value(
    executor: Executor, tmp_path: Path
) -> None:
    executor.submit("gang", meet, tmp_path, resources=Resources(ranks=2))
    executor.submit("a", abs, -1, resources=Resources())
    ended = {result.key: result for result in all_of(executor)}
    assert ended == {"gang": TaskResult("gang", ["0 of 2", "1 of 2"]), "a": TaskResult("a", 1)}


def test_gangs_that_could_each_take_half_of_the_slots_all_run(executor: Executor, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        executor.submit(name, meet, tmp_path / name, resources=Resources(ranks=2))
    assert [result.error or result.value for result in all_of(executor)] == [["0 of 2", "1 of 2"]] * 3


def test_a_gang_that_loses_a_rank_has_one_error_and_ends_all_its_ranks(
    executor: Executor, tmp_path: Path
) -> None:
    executor.submit("gang", lose_the_last, tmp_path, resources=Resources(ranks=2))
    (ended,) = all_of(executor)
    assert ended.error
    wait_for_end(int((tmp_path / "0").read_text()))
    executor.submit("a", abs, -1, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]


def test_a_key_is_refused_while_it_is_pending_and_free_again_afterwards(executor: Executor) -> None:
    executor.submit("a", abs, -1, resources=Resources())
    with pytest.raises(ValueError, match="a is pending already"):
        executor.submit("a", abs, -2, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 1)]
    executor.submit("a", abs, -3, resources=Resources())
    assert all_of(executor) == [TaskResult("a", 3)]


def test_a_cancelled_task_is_not_reported_and_its_key_is_free_at_once(
    executor: Executor, tmp_path: Path
) -> None:
    for name in "abcd":
        executor.submit(name, spend, tmp_path, name, resources=Resources())
    executor.cancel("a")
    executor.cancel("d")
    executor.cancel("unheard of")
    executor.submit("d", abs, -1, resources=Resources())
    ended = {result.key: result.value for result in all_of(executor)}
    assert ended == {"b": "b", "c": "c", "d": 1}
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "d").exists()


def test_an_executor_closes_twice_and_then_refuses_tasks(kind: str) -> None:
    executor = FACTORIES[kind]()
    executor.submit("a", time.sleep, 0.1, resources=Resources())
    executor.close()
    executor.close()
    assert executor.wait() == []
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit("b", abs, -1, resources=Resources())


@pytest.mark.usefixtures("in_processes")
def test_a_killed_worker_loses_only_its_task(executor: Executor) -> None:
    for name in "abcd":
        if name == "b":
            executor.submit(name, die, resources=Resources())
        else:
            executor.submit(name, abs, -1, resources=Resources())
    ended = {result.key: result for result in all_of(executor)}
    assert ended.pop("b").error
    assert ended == {name: TaskResult(name, 1) for name in "acd"}


@pytest.mark.usefixtures("in_processes")
def test_a_value_that_does_not_pickle_is_an_error_and_the_executor_continues(executor: Executor) -> None:
    executor.submit("result", unpicklable, resources=Resources())
    executor.submit("argument", id, sys._getframe(), resources=Resources())
    executor.submit("fine", abs, -1, resources=Resources())
    ended = {result.key: result for result in all_of(executor)}
    assert ended["result"].error
    assert ended["argument"].error
    assert ended["fine"].value == 1


@pytest.mark.usefixtures("in_processes")
def test_waiting_ends_at_its_time_limit_without_loss(executor: Executor) -> None:
    executor.submit("a", time.sleep, 1.0, resources=Resources())
    assert executor.wait(0.05) == []
    assert all_of(executor) == [TaskResult("a")]
