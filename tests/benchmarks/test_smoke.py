"""Every benchmark runs at its smallest size, or states the reason why it is not run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import VOCABULARY, prose, tokenizer_on

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@dataclass(frozen=True)
class SmokeRun:
    """The smallest run of a benchmark."""

    options: str
    """Separated by spaces; `{model}` is the folder of a random decoder, `{folder}` an empty folder."""
    output: str
    """A regular expression that the output matches."""
    judges_timings: bool = False
    """Whether the benchmark also exits 1, after its table, when its claim about timings does not hold."""


SMOKE_RUNS = {
    "executor": SmokeRun("--pieces 2", r"ray +one_by_one +[\d.]+ ms per empty piece"),
    "latency": SmokeRun(
        "--model {model} --pairs 1 --threads 1 --prompt-tokens 8 --new-tokens 4",
        r"decode: second ÷ first [\d.]+",
    ),
    "overhead": SmokeRun("--candidates 4 --durations 0", r"│ 0 +│ 4 +│ [\d.]+ +│ [\d.]+ +│ [\d.]+%"),
    "prediction": SmokeRun(
        "--model {model} --threads 1 --candidates 1 --table 6 --visits 1",
        r"decode_ms: median [\d.]+%, worst [\d.]+% of 1;[^\n]*\nwithin 5% in the median and 15% at worst",
        judges_timings=True,
    ),
    "racing": SmokeRun(
        "--seeds 1 --candidates 20 --windows 64 --shapes steps",
        r"\| 20 steps \|.*\n\nread at most .* of 1 races",
    ),
    "repeat": SmokeRun(
        "--model {model} --threads 1 --artifacts 1 --minutes 0",
        r"\| [\d.]+ \| [\d.]+ \| [+-][\d.]+% \|[^\n]*\nworst [^\n]*\nagree within 3%",
        judges_timings=True,
    ),
    "s3": SmokeRun("--megabytes 1 --rounds 1", r"│ download_file +│ [\d.]+ +│ \d+"),
    "scale": SmokeRun("--candidates 20 --slots 4", r"│ candidates +│ 20 [\s\S]*│ busy +│ [\d.]+"),
    "search": SmokeRun(
        "--evaluations 10 --seeds 1 --problems line --searches random --json {folder}/search.json",
        r"mean of 2 problems\nrandom +0\.\d+",
    ),
    "size": SmokeRun("--recipes 4", r"slimfront +4 +0 +4 "),
}

TESTED_WITH_INPUT = {"search_picture": "test_the_picture_of_searches_shows_every_search"}
"""Benchmarks that read the file of another benchmark, with the test that runs them."""

REAL_MODEL = "needs a real model and the Brown corpus, which are not in the repository"
NOT_RUN = {
    "cluster": "needs several minutes of a Ray that grows; run by `make test-cluster`",
    "front": REAL_MODEL,
    "layers": REAL_MODEL,
    "openvino_front": f"needs an environment with nncf; {REAL_MODEL}",
    "peer_llmcompressor": "runs in an environment with llmcompressor, started by benchmarks/peers.py",
    "peer_nncf": "runs in an environment with nncf, started by benchmarks/openvino_front.py",
    "peer_olive": "runs in an environment with olive-ai, started by benchmarks/front.py",
    "peer_ray_tune": "started by benchmarks/front.py, on its model",
    "peers": REAL_MODEL,
    "ranks": REAL_MODEL,
    "reuse": REAL_MODEL,
    "sparse_reference": REAL_MODEL,
    "sweep": REAL_MODEL,
    "techniques": REAL_MODEL,
}


def test_every_benchmark_has_a_smoke_run_or_a_reason() -> None:
    programs = {
        file.stem for file in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__":' in file.read_text()
    }
    covered = [*SMOKE_RUNS, *TESTED_WITH_INPUT, *NOT_RUN]
    assert sorted(programs) == sorted(covered), (
        "add a new benchmark to SMOKE_RUNS, or to NOT_RUN with the reason"
    )
    assert all(test in globals() for test in TESTED_WITH_INPUT.values())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 9 blocks and width 128, which the recipes of benchmarks/shapes.py fit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=9, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("decoder") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_on(prose()).save_pretrained(folder)
    return folder


def run(name: str, options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark from the repository's root, without the data that may be next to the repository."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "SLIMFRONT_DATA": str(folder / "no-data"),
    }
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options.split()],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE_RUNS)
def test_a_benchmark_prints_its_table_at_its_smallest_size(name: str, decoder: Path, tmp_path: Path) -> None:
    smoke = SMOKE_RUNS[name]
    completed = run(name, smoke.options.format(model=decoder, folder=tmp_path), tmp_path)
    allowed = {0}
    if smoke.judges_timings:
        allowed.add(1)
    assert completed.returncode in allowed, completed.stdout + completed.stderr
    assert re.search(smoke.output, completed.stdout), completed.stdout + completed.stderr


@pytest.mark.slow
def test_the_picture_of_searches_shows_every_search(tmp_path: Path) -> None:
    searches = "--evaluations 10 --seeds 1 --problems line --searches random,nsga2 --json"
    completed = run("search", f"{searches} {tmp_path}/search.json", tmp_path)
    assert completed.returncode == 0, completed.stderr
    completed = run("search_picture", f"{tmp_path}/search.json --svg {tmp_path}/search.svg", tmp_path)
    assert completed.returncode == 0, completed.stderr
    picture = (tmp_path / "search.svg").read_text()
    labels = set(re.findall(r">([a-z]\w+)</text>", picture))
    assert labels == {"evaluations", "random", "nsga2"}
    assert picture.count("<polyline") == 2
