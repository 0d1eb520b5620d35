"""Each benchmark runs at its smallest size and prints its results, so that no change of the code breaks it unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.overhead import write_model

ROOT = Path(__file__).parents[2]
MODEL, FOLDER = "MODEL", "FOLDER"
"""Stand for a tiny model and for an empty folder."""

SMALLEST: dict[str, tuple[list[str], str]] = {
    "executor": (["--pieces", "20"], "ms per empty piece"),
    "latency": (
        ["--model", MODEL, "--pairs", "1", "--threads", "1", "--prompt-tokens", "8", "--new-tokens", "4"],
        "decode",
    ),
    "overhead": (["--candidates", "20", "--durations", "0"], "slimfront"),
    "prediction": (
        ["--model", MODEL, "--threads", "1", "--candidates", "2", "--table", "16", "--visits", "1"],
        "within 5%",
    ),
    "racing": (["--seeds", "1", "--candidates", "20", "--windows", "64"], "surrogate"),
    "repeat": (["--model", MODEL, "--threads", "1", "--artifacts", "1", "--minutes", "0"], "decode"),
    "s3": (["--megabytes", "1", "--rounds", "1"], "put"),
    "scale": (["--candidates", "50", "--slots", "10"], "busy share"),
    "search": (
        ["--evaluations", "10", "--seeds", "1", "--problems", "line", "--searches", "random",
         "--json", f"{FOLDER}/runs.json"],
        "random",
    ),
    "size": (["--recipes", "4"], "llama"),
}  # fmt: skip
"""The smallest options of each benchmark, and a word of its output."""
GOALS = {"latency", "prediction", "repeat", "size"}
"""Benchmarks that exit with 1 if a goal is missed, which says nothing at this size."""
NOT_RUN = {
    "cluster": "it takes half an hour and runs in `make test-cluster`",
    "front": "it needs the Brown corpus and hours",
    "layers": "it needs the Brown corpus and the real decoder",
    "openvino_front": "it needs NNCF in another environment and the real decoder",
    "peer_llmcompressor": "it needs llm-compressor; `benchmarks.peers` starts it",
    "peer_nncf": "it needs NNCF; `benchmarks.openvino_front` starts it",
    "peer_olive": "it needs Olive; `benchmarks.front` starts it",
    "peer_ray_tune": "`benchmarks.front` starts it",
    "peers": "it needs llm-compressor in another environment and the Brown corpus",
    "ranks": "it needs the Brown corpus and the real decoder",
    "reuse": "it needs the Brown corpus and the real encoder",
    "search_picture": "it draws the runs that `benchmarks.search` wrote, and is run after it here",
    "sparse_reference": "it needs the Brown corpus and the real decoder",
    "sweep": "it needs the Brown corpus and the real encoder",
    "techniques": "it needs the Brown corpus and the real models",
}
"""Why a benchmark has no run of its own."""


def run(name: str, *options: str, codes: tuple[int, ...] = (0,)) -> str:
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )
    assert process.returncode in codes, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that has several blocks, so that random shapes of it differ."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, width=64, blocks=4)
    return folder


def test_every_benchmark_has_a_smallest_run_or_a_reason_against_it() -> None:
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text()}
    assert programs == SMALLEST.keys() | NOT_RUN.keys()
    assert not SMALLEST.keys() & NOT_RUN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_benchmark_runs_at_its_smallest_size(name: str, model: Path, tmp_path: Path) -> None:
    options, word = SMALLEST[name]
    values = [option.replace(MODEL, str(model)).replace(FOLDER, str(tmp_path)) for option in options]
    codes = (0, 1) if name in GOALS else (0,)
    assert word in run(name, *values, codes=codes)
    if name == "search":
        run("search_picture", str(tmp_path / "runs.json"), "--svg", str(tmp_path / "runs.svg"))
        assert (tmp_path / "runs.svg").read_text().startswith("<svg")
