"""RayExecutor on a real Ray that grows and shrinks with its tasks: its nodes are processes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cluster import Head, NodeType, head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# The first lines of each program: each is a process of its own, since a process can use only one Ray.
BEGIN = """
import json, os, socket, sys, time
from contextlib import closing
from pathlib import Path
from cluster.executors.executor import Resources, ExecutorUnavailableError
from cluster.on_ray.executor import RayExecutor

folder = Path(sys.argv[1])

def node():
    import ray
    return ray.get_runtime_context().get_node_id()

def spend(name, seconds):
    began = time.time()
    (folder / name).write_text(node())
    time.sleep(seconds)
    return node(), began, time.time()

def meet():
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(address) as server:
            return [server.accept()[0].recv(100).decode() for _ in range(ranks - 1)]
    while True:
        try:
            with socket.create_connection(address) as connection:
                connection.send(f"{rank}: {os.environ['LOCAL_RANK']}".encode())
                return None
        except ConnectionRefusedError:
            time.sleep(0.05)

def rows(results):
    return [[result.key, result.value, result.error, result.preempted] for result in results]

def all_of(executor):
    results = []
    while new := executor.wait(60):
        results += new
    return results

with closing(RayExecutor()) as executor:
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    types = {
        "ordinary": NodeType(cpus=1, memory_gib=4, max_nodes=3),
        "timing": NodeType(cpus=1, memory_gib=4, max_nodes=1, labels={"target": "laptop"}),
    }
    with head(types, idle_seconds=4) as started:
        yield started


@contextmanager
def program(cluster: Head, folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """Run a driver whose body uses an `executor` and prints its result as JSON."""
    file = folder / "program.py"
    file.write_text(BEGIN + textwrap.indent(textwrap.dedent(body), "    "))
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(file), str(folder)], env={**cluster.env, "RAY_ADDRESS": cluster.gcs},
            stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def output_of(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return json.loads(output)


def until(holds: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.1)


def test_a_cluster_grows_to_its_limit_and_its_nodes_end_without_tasks(cluster: Head, tmp_path: Path) -> None:
    body = """
    first_slots = executor.slots
    for number in range(16):
        executor.submit(str(number), spend, f"did {number}", 6, resources=Resources(memory_gib=0.5))
    ended = all_of(executor)
    print(json.dumps([first_slots, executor.slots, rows(ended)]), flush=True)
    (folder / "done").touch()
    executor.submit("late", time.sleep, 0.1, resources=Resources())
    executor.wait(60)
    while not (folder / "end").exists():
        executor.wait(1)
        time.sleep(0.1)
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "done").exists)
        node_count = len(cluster.nodes())

        until(lambda: not cluster.nodes())
        (tmp_path / "end").touch()
        first_slots, last_slots, ended = output_of(process)
    assert first_slots > 1
    assert last_slots == node_count == 4
    assert sorted(key for key, *_ in ended) == sorted(str(number) for number in range(16))
    assert not any(error for _, _, error, _ in ended)
    assert len({value[0] for _, value, _, _ in ended}) == 4


def test_a_task_whose_node_is_lost_has_one_error_and_runs_on_another_node_when_submitted_again(
    cluster: Head, tmp_path: Path
) -> None:
    body = """
    executor.submit("a", spend, "first", 600, resources=Resources(memory_gib=0.5))
    failed = executor.wait(120)
    executor.submit("a", spend, "second", 0, resources=Resources(memory_gib=0.5))
    print(json.dumps(rows(failed) + rows(all_of(executor))))
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "first").exists)
        until(lambda: (tmp_path / "first").read_text())
        lost_node = (tmp_path / "first").read_text()
        cluster.kill(next(node for node in cluster.nodes() if node.id == lost_node))
        first, second = output_of(process)
    assert first[2]
    assert first[3]
    assert second[1][0] != lost_node


def test_a_task_that_no_node_could_hold_is_one_line(cluster: Head, tmp_path: Path) -> None:
    body = """
    began = time.time()
    executor.submit("a", abs, -1, resources=Resources())
    ended = all_of(executor)
    executor.submit("b", abs, -1, resources=Resources(memory_gib=100, labels={"target": "mainframe"}))
    try:
        executor.wait(120)
    except ExecutorUnavailableError as error:
        print(json.dumps([rows(ended), str(error)]))
    """
    with program(cluster, tmp_path, body) as process:
        ended, message = output_of(process)
    assert ended == [["a", 1, None, False]]
    assert message.startswith("no node that this cluster could have holds 1 CPU, 100 GiB, target: mainframe")
    assert "at most 1 CPU, 4 GiB each" in message
    assert "\n" not in message


def test_a_gang_uses_several_nodes_and_its_ranks_reach_each_other(cluster: Head, tmp_path: Path) -> None:
    body = """
    for name in "ab":
        executor.submit(name, meet, resources=Resources(ranks=2, memory_gib=0.5))
    began = time.time()
    ended = all_of(executor)
    print("gang", time.time() - began, file=sys.stderr)
    print(json.dumps(rows(ended)))
    """
    with program(cluster, tmp_path, body) as process:
        ended = output_of(process)
    assert sorted(ended) == [[name, ["1: 0"], None, False] for name in "ab"]


def test_exclusive_tasks_use_the_node_with_their_label_while_other_tasks_run_on_other_nodes(
    cluster: Head, tmp_path: Path
) -> None:
    body = """
    for name in ("only 1", "only 2"):
        executor.submit(name, spend, name, 10, resources=Resources(exclusive=True, labels={"target": "laptop"}))
    while not (folder / "only 1").exists():
        executor.wait(0.1)
    executor.submit("other", spend, "other", 0, resources=Resources())
    print(json.dumps(rows(all_of(executor))))
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "only 1").exists)
        until(lambda: (tmp_path / "only 1").read_text())
        types = {node.id: node.type for node in cluster.nodes()}
        ended = {key: value for key, value, *_ in output_of(process)}
    assert {types[ended[name][0]] for name in ("only 1", "only 2")} == {"timing"}
    assert ended["other"][0] != ended["only 1"][0]
    first, second = sorted(ended[name][1:] for name in ("only 1", "only 2"))
    assert first[1] <= second[0]


def test_a_cluster_without_an_autoscaler_has_a_fixed_number_of_slots(tmp_path: Path) -> None:
    body = """
    executor.submit("a", spend, "a", 3, resources=Resources(memory_gib=0.5))
    ended = all_of(executor)
    slots = executor.slots
    for name in "cd":
        executor.submit(name, spend, name, 600, resources=Resources())
    while not all((folder / name).exists() for name in "cd"):
        executor.wait(0.1)
    messages = []
    with closing(RayExecutor(start_seconds=4)) as second:
        second.submit("b", abs, -1, resources=Resources())
        try:
            second.wait(60)
        except ExecutorUnavailableError as error:
            messages.append(str(error))
    for name in "cd":
        executor.cancel(name)
    executor.submit("b", abs, -1, resources=Resources(memory_gib=5000))
    try:
        executor.wait(120)
    except ExecutorUnavailableError as error:
        messages.append(str(error))
    print(json.dumps([rows(ended), slots, messages]))
    """
    with head(cpus=2) as fixed, program(fixed, tmp_path, body) as process:
        ended, slots, (late, message) = output_of(process)
    assert ended[0][2] is None
    assert slots == 2
    assert late.startswith("no worker came within 4 s for 1 CPU (1 waiting); the cluster has 2 CPU, ")
    assert message.startswith("no node that this cluster could have holds 1 CPU, 5000 GiB")
