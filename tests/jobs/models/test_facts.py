"""Facts about models are computed once for the same contents, and never become wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import data
from jobs.materials import TextSource
from jobs.models import facts, loading
from jobs.models.families import family
from jobs.models.model import Model


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counted(values: list[Any]) -> Any:
    """A computation that returns these values one after the other, and fails after the last."""
    return lambda: values.pop(0)


def test_the_same_contents_are_computed_once() -> None:
    compute = counted([[1, 2]])
    assert facts.remembered("kind", ["text", b"bytes"], compute) == [1, 2]
    assert facts.remembered("kind", ["text", b"bytes"], compute) == [1, 2]


@pytest.mark.parametrize(
    ("kind", "contents"),
    [("other", ["a", "b"]), ("kind", ["a", "c"]), ("kind", ["ab"]), ("kind", ["b", "a"])],
)
def test_other_contents_are_another_fact(kind: str, contents: list[str]) -> None:
    compute = counted(["first", "second"])
    assert facts.remembered("kind", ["a", "b"], compute) == "first"
    assert facts.remembered(kind, contents, compute) == "second"


def test_a_damaged_file_is_computed_again(cache: Path) -> None:
    compute = counted([1, 2])
    facts.remembered("kind", ["a"], compute)
    (file,) = facts.folder().iterdir()
    file.write_text('{"torn')
    assert facts.remembered("kind", ["a"], compute) == 2
    assert facts.remembered("kind", ["a"], compute) == 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(cache: Path) -> None:
    cache.write_text("a file in the place of the folder")
    assert facts.remembered("kind", ["a"], counted([1])) == 1


def test_errors_are_not_remembered() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        facts.remembered("kind", ["a"], fail)
    assert facts.remembered("kind", ["a"], counted([1])) == 1


def test_a_remembered_layout_equals_that_of_the_model(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loading.empty_module(loading.load_config(tiny_llama), "meta")
    expected = Model(module, family("llama"), tiny_llama).layout()
    assert loading.original_layout(tiny_llama) == expected
    monkeypatch.setattr(loading, "empty_module", lambda *_: pytest.fail("computed again"))
    assert loading.original_layout(tiny_llama) == expected
    assert loading.task_of(tiny_llama) == "causal-lm"


def test_a_text_is_counted_again_when_it_changes(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    source = TextSource(str(file), samples=2, tokens=16)
    file.write_text("enough text for two short windows of tokens. " * 20)
    data.check_windows(source, tiny_llama)
    file.write_text("too short")
    with pytest.raises(ValueError, match="samples of 16 tokens need"):
        data.check_windows(source, tiny_llama)
