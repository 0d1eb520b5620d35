"""LocalStore: killed at every step, damaged, on another file system."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.storage.local_store import LocalStore
from cluster.storage.open import artifact_url, open_store, prepare_store

# Runs one operation and kills itself at its nth touch of the store's files.
KILLED_WRITER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from cluster.storage.local_store import LocalStore

    root, source, operation, fatal = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    store = LocalStore(root)
    touches = 0

    def watch(event, arguments):
        global touches
        if event.split(".")[0] in ("open", "os", "shutil") and str(root) in str(arguments):
            touches += 1
            if touches == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if operation == "put":
        store.put(source)
    elif operation == "remove":
        store.remove(store.put(source))
    elif operation == "forget":
        store.commit("results/01", {"perplexity": 12.5, "padding": "x" * 100_000})
        store.forget("results/01")
    else:
        store.commit("results/01", {"perplexity": 12.5, "padding": "x" * 100_000})
    """
)


@pytest.mark.parametrize("operation", ["put", "remove", "commit", "forget"])
def test_a_writer_killed_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, model: Path, operation: str
) -> None:
    ref = LocalStore(tmp_path / "reference").put(model)
    states = set()
    for fatal in range(1, 60):
        root = tmp_path / f"store-{fatal}"
        ended = subprocess.run(
            [sys.executable, "-c", KILLED_WRITER, str(root), str(model), operation, str(fatal)],
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        store = LocalStore(root)
        if store.has(ref):
            store.fetch(ref, tmp_path / f"copy-{fatal}")
            states.add("artifact")
        else:
            states.add("no artifact")
        record = store.record("results/01")
        assert record is None or len(record["padding"]) == 100_000
        assert list(store.records("")) == ["results/01"] * (record is not None)
        # A later process can do it.
        assert store.put(model) == ref
        assert store.commit("results/01", {}) == (record is None)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
    assert ended.returncode == 0
    assert fatal > 3
    assert operation in ("commit", "forget") or states == {"artifact", "no artifact"}


def test_damaged_content_is_not_fetched(tmp_path: Path, model: Path) -> None:
    store = LocalStore(tmp_path / "store")
    ref = store.put(model)
    (file,) = (tmp_path / "store" / "objects").rglob("weights")
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[50_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        store.fetch(ref, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    store.remove(ref)
    assert store.put(model) == ref
    store.fetch(ref, tmp_path / "copy")


def test_stored_files_are_read_only_and_fetched_as_links(tmp_path: Path, model: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.fetch(store.put(model), tmp_path / "copy")
    status = (tmp_path / "copy" / "sub" / "weights").stat()
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert status.st_nlink == 2


def test_across_file_systems_files_are_copied(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    store = LocalStore(tmp_path / "store")
    ref = store.put(model)
    monkeypatch.setattr(os, "link", refuse)
    store.fetch(ref, tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "weights").read_bytes() == (model / "sub" / "weights").read_bytes()
    assert (tmp_path / "copy" / "sub" / "weights").stat().st_nlink == 1


def test_unfinished_writes_are_removed_after_a_day_and_recent_ones_stay(tmp_path: Path) -> None:
    prepare_store(str(tmp_path))
    for name in ("old", "new"):
        (tmp_path / "tmp" / name).mkdir()
        (tmp_path / "tmp" / name / "half").write_bytes(b"x")
        (tmp_path / "tmp" / f"{name}-file").write_bytes(b"x")
    for name in ("old", "old-file"):
        os.utime(tmp_path / "tmp" / name, (0, 0))
    prepare_store(str(tmp_path))
    assert sorted(file.name for file in (tmp_path / "tmp").iterdir()) == ["new", "new-file"]


def test_a_fetch_counts_as_a_use(tmp_path: Path, model: Path) -> None:
    store = LocalStore(tmp_path / "store")
    ref = store.put(model)
    (artifact,) = (tmp_path / "store" / "objects").glob("*/*")
    os.utime(artifact, (1000, 1000))
    assert [stored.used_at for stored in store.holdings().artifacts] == [1000]
    store.fetch(ref, tmp_path / "copy")
    assert store.holdings().artifacts[0].used_at > 1000


def test_unfinished_writes_are_counted_and_swept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.ensure()
    (tmp_path / "tmp" / "half").mkdir()
    (tmp_path / "tmp" / "half" / "weights").write_bytes(b"x" * 1000)
    assert store.holdings().unfinished_bytes == 1000
    store.sweep(60)
    assert store.holdings().unfinished_bytes == 1000
    store.sweep(0)
    assert store.holdings().unfinished_bytes == 0


def test_a_finished_write_leaves_nothing_behind(tmp_path: Path, model: Path) -> None:
    store = LocalStore(tmp_path / "store")
    ref = store.put(model)
    store.put(model)
    store.commit("results/01", {})
    store.commit("results/01", {})
    store.remove(ref)
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_store_is_opened_by_its_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "runs"))
    assert store.commit("results/01", {"a": 1})
    assert LocalStore(tmp_path / "runs").record("results/01") == {"a": 1}
    with pytest.raises(ValueError, match="no gs:// stores; give a folder or s3://bucket/prefix"):
        open_store("gs://bucket/prefix")


def test_the_url_of_an_artifact_is_the_folder_of_its_files(tmp_path: Path, model: Path) -> None:
    ref = open_store(str(tmp_path / "runs")).put(model)
    folder = Path(artifact_url(str(tmp_path / "runs"), ref.digest))
    assert (folder / "sub" / "weights").read_bytes() == (model / "sub" / "weights").read_bytes()
    with pytest.raises(ValueError, match="no artifact's digest"):
        artifact_url(str(tmp_path / "runs"), "../..")
