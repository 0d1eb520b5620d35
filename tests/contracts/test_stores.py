"""The contract of every store. A new class in a module of `cluster.storage` is tested here automatically."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import storage
from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import open_store
from cluster.storage.store import ArtifactStore, Holdings

# The address of an empty store of each kind.
ADDRESSES: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {
    "LocalStore": lambda request, folder: str(folder / "store"),
    "S3Store": lambda request, folder: str(request.getfixturevalue("s3_address")),
}


def implementations() -> dict[str, type]:
    methods = [
        name for name, member in vars(ArtifactStore).items() if callable(member) and not name.startswith("_")
    ]
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for package in (storage,)
        for module in pkgutil.iter_modules(package.__path__)
    ]
    classes: dict[str, type] = {}
    for module in modules:
        for name, candidate in inspect.getmembers(module, inspect.isclass):
            is_defined_there = candidate.__module__ == module.__name__ and candidate is not ArtifactStore
            if is_defined_there and has_methods(candidate, methods):
                classes[name] = candidate
    return classes


def has_methods(candidate: type, methods: list[str]) -> bool:
    return all(callable(getattr(candidate, method, None)) for method in methods)


@pytest.fixture(params=sorted(ADDRESSES))
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ADDRESSES[request.param](request, tmp_path)


@pytest.fixture
def store(address: str, tmp_path: Path) -> ArtifactStore:
    return open_store(address, tmp_path / "downloads")


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    files = {
        "config.json": b"{}",
        "weights/a.safetensors": os.urandom(3_000_000),
        "empty": b"",
        ".hidden": b"x",
    }
    return folder_of(tmp_path / "model", files)


def test_every_store_is_tested_here() -> None:
    assert set(implementations()) == set(ADDRESSES)


def test_opening_a_store_and_reading_from_it_creates_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    ref = ArtifactRef("0" * 64, 1)
    assert not store.has(ref)
    assert store.record("results/01") is None
    assert list(store.records("results/")) == []
    assert store.holdings() == Holdings((), 0, 0, 0)
    with pytest.raises(LookupError):
        store.fetch(ref, tmp_path / "copy")
    store.remove(ref)
    store.forget("results/01")
    store.sweep(0)
    assert list(tmp_path.iterdir()) == []


def test_opening_a_store_sends_no_request_and_writes_no_file(tmp_path: Path) -> None:
    # No server answers at port 9, and no folder can be created below a file.
    (tmp_path / "file").touch()
    for address in ("s3://bucket/prefix?endpoint=http://127.0.0.1:9", str(tmp_path / "file" / "store")):
        open_store(address, tmp_path / "downloads")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_store_that_cannot_be_used_is_refused_before_the_first_write(address: str, tmp_path: Path) -> None:
    open_store(address).ensure()
    (tmp_path / "file").touch()
    unusable = str(tmp_path / "file" / "store")
    if address.startswith("s3://"):
        unusable = re.sub("//[^/]*/", "//no-such-bucket/", address, count=1)
    with pytest.raises(OSError, match=r"no bucket|Not a directory"):
        open_store(unusable).ensure()


def test_a_fetched_artifact_equals_the_folder_that_was_put(
    store: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    ref = store.put(model)
    store.fetch(ref, tmp_path / "new" / "copy")
    assert contents(tmp_path / "new" / "copy") == contents(model)
    assert ref.size_bytes == 3_000_003
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["copy"]


def test_the_same_content_has_one_reference_and_other_content_another(
    store: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    ref = store.put(model)
    same_content = folder_of(tmp_path / "elsewhere", contents(model))
    assert store.put(same_content) == ref
    (same_content / "empty").rename(same_content / "renamed")
    assert store.put(same_content).digest != ref.digest
    (same_content / "renamed").rename(same_content / "empty")
    (same_content / "config.json").write_bytes(b"[]")
    changed = store.put(same_content)
    assert changed.digest != ref.digest
    assert changed.size_bytes == ref.size_bytes


def test_a_later_change_of_the_folder_does_not_change_the_artifact(
    store: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    original = contents(model)
    ref = store.put(model)
    (model / "config.json").write_bytes(b"changed")
    store.fetch(ref, tmp_path / "copy")
    assert contents(tmp_path / "copy") == original


def test_a_removed_artifact_is_absent_and_can_be_put_again(
    store: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    ref = store.put(model)
    assert store.has(ref)
    store.remove(ref)
    store.remove(ref)
    assert not store.has(ref)
    with pytest.raises(LookupError, match=ref.digest):
        store.fetch(ref, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert store.put(model) == ref
    assert store.has(ref)


def test_an_existing_folder_is_not_overwritten(store: ArtifactStore, model: Path, tmp_path: Path) -> None:
    ref = store.put(model)
    (tmp_path / "copy").mkdir()
    with pytest.raises(FileExistsError, match="copy"):
        store.fetch(ref, tmp_path / "copy")


def test_links_are_refused(store: ArtifactStore, model: Path) -> None:
    (model / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="link"):
        store.put(model)
    (model / "link").unlink()
    (model / "folder").symlink_to(model / "weights")
    with pytest.raises(ValueError, match="link"):
        store.put(model)


def test_a_folder_without_files_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "nothing" / "here").mkdir(parents=True)
    with pytest.raises(ValueError, match="no files"):
        store.put(tmp_path / "nothing")


@pytest.mark.parametrize("digest", ["", "../../etc", "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_an_invalid_digest_is_refused(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        store.has(ArtifactRef(digest, 1))


def test_a_record_is_created_once_and_never_changed(store: ArtifactStore) -> None:
    record = {"metrics": {"size_bytes": 1e6, "accuracy": 0.123456789012345}, "steps": ["é", None, True]}
    assert store.record("results/01") is None
    assert store.commit("results/01", record)
    assert not store.commit("results/01", {"other": 1})
    assert store.record("results/01") == record


def test_records_are_listed_by_prefix_in_order(store: ArtifactStore) -> None:
    for key in ("results/0b", "results/0a", "results/1a", "models/0a", "results/0a/deep", "results/v1.json"):
        assert store.commit(key, {})
    assert list(store.records("results/0")) == ["results/0a", "results/0a/deep", "results/0b"]
    assert list(store.records("results/")) == [
        "results/0a", "results/0a/deep", "results/0b", "results/1a", "results/v1.json"
    ]  # fmt: skip
    assert len(list(store.records(""))) == 6
    assert list(store.records("unheard/of")) == []


@pytest.mark.parametrize(
    "key",
    ["", "results", "/results/a", "results/", "results//a", "../a/b", "results/../a", "results/.", "results/.a",
     "Results/a", "results/a b", "results/a\n", "results/ü"]
)  # fmt: skip
def test_a_key_that_could_leave_its_folder_is_refused(store: ArtifactStore, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        store.commit(key, {})
    with pytest.raises(ValueError, match="key"):
        store.record(key)


def test_a_prefix_that_leaves_the_store_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="prefix"):
        list(store.records("../objects/"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_a_record_with_a_non_finite_number_is_refused(store: ArtifactStore, value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        store.commit("results/01", {"perplexity": value})
    assert store.record("results/01") is None
    assert list(store.records("results/")) == []


def test_a_forgotten_record_can_be_created_anew(store: ArtifactStore) -> None:
    assert store.commit("artifacts/01", {"digest": "a"})
    store.forget("artifacts/01")
    store.forget("artifacts/01")
    assert store.record("artifacts/01") is None
    assert list(store.records("")) == []
    assert store.commit("artifacts/01", {"digest": "b"})
    assert store.record("artifacts/01") == {"digest": "b"}
    with pytest.raises(ValueError, match="key"):
        store.forget("../tmp")


def test_holdings_list_all_artifacts_with_their_last_use(
    store: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    assert store.holdings() == Holdings((), 0, 0, 0)
    first = store.put(model)
    (model / "empty").write_bytes(b"full")
    second = store.put(model)
    store.commit("results/01", {"a": 1})
    used = {artifact.ref: artifact.used_at for artifact in store.holdings().artifacts}
    assert used.keys() == {first, second}
    assert all(abs(used_at - time.time()) < 60 for used_at in used.values())
    assert store.holdings().records == 1
    assert store.holdings().records_bytes > 0
    time.sleep(0.02)
    store.fetch(first, tmp_path / "copy")
    later = {artifact.ref: artifact.used_at for artifact in store.holdings().artifacts}
    assert later[first] >= later[second]
    store.sweep(0)
    assert store.holdings().unfinished_bytes == 0
    store.remove(first)
    assert [artifact.ref for artifact in store.holdings().artifacts] == [second]


def _race(address: str, number: int, start: object, wins: object) -> None:
    store = open_store(address)
    start.wait()  # type: ignore[attr-defined]
    for key in range(20):
        if store.commit(f"results/{key}", {"winner": number, "padding": "x" * 10_000}):
            wins.put((key, number))  # type: ignore[attr-defined]
    wins.put(None)  # type: ignore[attr-defined]


def test_exactly_one_of_eight_processes_commits_a_key(address: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, wins = spawn.Barrier(8), spawn.Queue()
    racers = [spawn.Process(target=_race, args=(address, number, start, wins)) for number in range(8)]
    for racer in racers:
        racer.start()
    winners: dict[int, int] = {}
    ended = 0
    while ended < 8:
        win = wins.get(timeout=60)
        if win is None:
            ended += 1
        else:
            key, number = win
            assert key not in winners
            winners[key] = number
    for racer in racers:
        racer.join()
    store = open_store(address)
    assert sorted(winners) == list(range(20))
    for key, number in winners.items():
        record = store.record(f"results/{key}")
        assert record is not None
        assert record["winner"] == number
