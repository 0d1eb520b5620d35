"""A real Ray that grows and shrinks with the work: its nodes are processes of this machine."""

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

# What each program begins with: each is a driver of its own, since a process has one Ray in its life.
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
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(place) as server:
            return [server.accept()[0].recv(100).decode() for _ in range(ranks - 1)]
    while True:
        try:
            with socket.create_connection(place) as one:
                one.send(f"{rank}: {os.environ['LOCAL_RANK']}".encode())
                return None
        except ConnectionRefusedError:
            time.sleep(0.05)

def told(ended):
    return [[one.key, one.value, one.error, one.preempted] for one in ended]

def all_of(executor):
    ended = []
    while some := executor.wait(60):
        ended += some
    return ended

with closing(RayExecutor()) as executor:
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    types = {
        "ordinary": NodeType(cpus=1, memory_gib=4, most=3),
        "timing": NodeType(cpus=1, memory_gib=4, most=1, labels={"target": "laptop"}),
    }
    with head(types, idle_seconds=4) as found:
        yield found


@contextmanager
def program(cluster: Head, folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A driver that does this with an `executor`, and prints what it found as JSON."""
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


def found_by(process: subprocess.Popen[str]) -> Any:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return json.loads(said)


def until(holds: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.1)


def test_a_cluster_grows_as_far_as_it_can_and_its_nodes_go_when_nothing_is_left_to_do(
    cluster: Head, tmp_path: Path
) -> None:
    body = """
    before = executor.slots
    for number in range(16):
        executor.submit(str(number), spend, f"did {number}", 6, resources=Resources(memory_gib=0.5))
    ended = all_of(executor)
    print(json.dumps([before, executor.slots, told(ended)]), flush=True)
    (folder / "done").touch()
    executor.submit("late", time.sleep, 0.1, resources=Resources())
    executor.wait(60)
    while not (folder / "end").exists():
        executor.wait(1)
        time.sleep(0.1)
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "done").exists)
        most = len(cluster.nodes())

        until(lambda: not cluster.nodes())
        (tmp_path / "end").touch()
        before, after, ended = found_by(process)
    assert before > 1
    assert after == most == 4
    assert sorted(key for key, *_ in ended) == sorted(str(number) for number in range(16))
    assert not any(lost for _, _, lost, _ in ended)
    assert len({value[0] for _, value, _, _ in ended}) == 4


def test_a_piece_whose_node_goes_away_is_lost_once_and_runs_elsewhere_when_it_is_given_again(
    cluster: Head, tmp_path: Path
) -> None:
    body = """
    executor.submit("a", spend, "first", 600, resources=Resources(memory_gib=0.5))
    lost = executor.wait(120)
    executor.submit("a", spend, "second", 0, resources=Resources(memory_gib=0.5))
    print(json.dumps(told(lost) + told(all_of(executor))))
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "first").exists)
        until(lambda: (tmp_path / "first").read_text())
        gone = (tmp_path / "first").read_text()
        cluster.kill(next(node for node in cluster.nodes() if node.id == gone))
        first, second = found_by(process)
    assert first[2]
    assert first[3]
    assert second[1][0] != gone


def test_what_no_node_could_hold_ends_in_one_line(cluster: Head, tmp_path: Path) -> None:
    body = """
    began = time.time()
    executor.submit("a", abs, -1, resources=Resources())
    ended = all_of(executor)
    executor.submit("b", abs, -1, resources=Resources(memory_gib=100, labels={"target": "mainframe"}))
    try:
        executor.wait(120)
    except ExecutorUnavailableError as error:
        print(json.dumps([told(ended), str(error)]))
    """
    with program(cluster, tmp_path, body) as process:
        ended, said = found_by(process)
    assert ended == [["a", 1, None, False]]
    assert said.startswith("no node that this cluster could have holds 1 CPU, 100 GiB, target: mainframe")
    assert "at most 1 CPU, 4 GiB each" in said
    assert "\n" not in said


def test_a_gang_spreads_over_nodes_and_its_ranks_find_each_other(cluster: Head, tmp_path: Path) -> None:
    body = """
    for name in "ab":
        executor.submit(name, meet, resources=Resources(ranks=2, memory_gib=0.5))
    began = time.time()
    ended = all_of(executor)
    print("gang", time.time() - began, file=sys.stderr)
    print(json.dumps(told(ended)))
    """
    with program(cluster, tmp_path, body) as process:
        ended = found_by(process)
    assert sorted(ended) == [[name, ["1: 0"], None, False] for name in "ab"]


def test_exclusive_pieces_have_the_node_with_their_label_while_others_go_on_elsewhere(
    cluster: Head, tmp_path: Path
) -> None:
    body = """
    for name in ("only 1", "only 2"):
        executor.submit(name, spend, name, 10, resources=Resources(exclusive=True, labels={"target": "laptop"}))
    while not (folder / "only 1").exists():
        executor.wait(0.1)
    executor.submit("other", spend, "other", 0, resources=Resources())
    print(json.dumps(told(all_of(executor))))
    """
    with program(cluster, tmp_path, body) as process:
        until((tmp_path / "only 1").exists)
        until(lambda: (tmp_path / "only 1").read_text())
        types = {node.id: node.type for node in cluster.nodes()}
        ended = {key: value for key, value, *_ in found_by(process)}
    assert {types[ended[name][0]] for name in ("only 1", "only 2")} == {"timing"}
    assert ended["other"][0] != ended["only 1"][0]
    first, second = sorted(ended[name][1:] for name in ("only 1", "only 2"))
    assert first[1] <= second[0]


def test_a_cluster_that_does_not_grow_has_the_slots_that_it_has(tmp_path: Path) -> None:
    body = """
    executor.submit("a", spend, "a", 3, resources=Resources(memory_gib=0.5))
    ended = all_of(executor)
    slots = executor.slots
    for name in "cd":
        executor.submit(name, spend, name, 600, resources=Resources())
    while not all((folder / name).exists() for name in "cd"):
        executor.wait(0.1)
    said = []
    with closing(RayExecutor(start_seconds=4)) as beside:
        beside.submit("b", abs, -1, resources=Resources())
        try:
            beside.wait(60)
        except ExecutorUnavailableError as error:
            said.append(str(error))
    for name in "cd":
        executor.cancel(name)
    executor.submit("b", abs, -1, resources=Resources(memory_gib=5000))
    try:
        executor.wait(120)
    except ExecutorUnavailableError as error:
        said.append(str(error))
    print(json.dumps([told(ended), slots, said]))
    """
    with head(cpus=2) as fixed, program(fixed, tmp_path, body) as process:
        ended, slots, (late, said) = found_by(process)
    assert ended[0][2] is None
    assert slots == 2
    assert late.startswith("no worker came within 4 s for 1 CPU (1 waiting); the cluster has 2 CPU, ")
    assert said.startswith("no node that this cluster could have holds 1 CPU, 5000 GiB")
