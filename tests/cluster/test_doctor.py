"""What the doctor says of machines good and bad."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import doctor

GIB = 2**30


def test_every_fact_has_a_name_and_a_value() -> None:
    found = doctor.facts()
    assert {"processors", "memory", "ray", "gpus"} <= {fact.what for fact in found}
    assert all(fact.what and fact.value for fact in found)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (doctor.processors(2), doctor.processors(1)),
        (doctor.memory(8 * GIB), doctor.memory(GIB)),
        (doctor.shared_memory(GIB), doctor.shared_memory(64 * 2**20)),
        (doctor.disk(50 * GIB), doctor.disk(GIB)),
    ],
)
def test_too_little_of_something_comes_with_a_hint(good: doctor.Fact, bad: doctor.Fact) -> None:
    assert good.ok
    assert not bad.ok
    assert bad.hint


@pytest.mark.parametrize(
    ("script", "count"), [("echo 'GPU 0: A'; echo 'GPU 1: B'", 2), ("echo no driver; exit 9", 0), ("", 0)]
)
def test_gpus_are_counted_by_the_drivers_tool(
    script: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.gpus() == count


def test_without_the_drivers_tool_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor.gpus() == 0


@pytest.mark.ray
def test_a_local_ray_starts_and_works() -> None:
    assert doctor.ray_works() == doctor.Fact("local ray", "starts and works")
