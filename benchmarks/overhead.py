"""The cost of an empty candidate: ask → Ray → commit → ledger → tell → outbox, with nothing done in the job.

python -m benchmarks.overhead [--candidates 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import tempfile
import time
from pathlib import Path

import psutil
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.on_ray import RayExecutor
from cluster.store import open_store
from jobs.job import Job, Measurement, Outcome, Success, outcome_to_dict
from orchestrator.config import load
from orchestrator.launch import launch
from orchestrator.prepare import prepare
from orchestrator.progress import Status

STUDY = """
name: overhead
model: {folder}/model
data:
  calibration: {{path: "package:pydoc_data.topics", samples: 1, tokens: 16}}
  evaluation: {{path: "package:pydoc_data.topics", tokens: 16, window: 16}}
objectives: {{size_bytes: {{goal: min}}, accuracy: {{goal: max}}}}
space: {{width: {{prune_ffn: {{ratio: {{low: 0.01, high: 0.9}}, correction: [none, bias, least_squares]}}}}}}
search: {{candidates: {candidates}, algorithm: {algorithm}}}
store: {folder}/runs
"""


def write_model(folder: Path) -> None:
    """A random Llama with room for a thousand different widths, and a tokenizer of bytes."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def nothing(job: Job, store: str) -> Outcome:
    """An empty job: only its record is committed, as every job's is."""
    accuracy = int(job.id, 16) / 16**16  # any number that differs
    outcome = Success("none", 0, Measurement({"accuracy": accuracy}), 0.0)
    record = {"result": outcome_to_dict(outcome), "recipe": job.recipe.to_dict(), "meters": list(job.meters)}
    open_store(store).commit(f"results/{job.id}", record)
    return outcome


def measure(candidates: int, algorithm: str, slots: int = 2) -> dict[str, float]:
    """Slot time per empty candidate in ms: slots × time ÷ candidates, from the first that ended to the last."""
    ends: list[tuple[float, int]] = []

    def note(status: Status) -> None:
        ends.append((time.perf_counter(), status.measured))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        file = folder / "study.yaml"
        file.write_text(STUDY.format(folder=folder, candidates=candidates, algorithm=algorithm))
        prepared = prepare(load(file))
        store = str(folder / "runs")
        executor = RayExecutor(slots)
        began = time.perf_counter()
        launch(prepared, note, executor=executor, do=functools.partial(nothing, store=store))
        whole = time.perf_counter() - began
        for process in psutil.Process().children():  # the mirror, which has a minute's work left
            process.terminate()
    running = [(at, count) for at, count in ends if count > 0]
    (first_at, first), (last_at, last) = running[0], running[-1]
    return {
        "slot_ms": 1000 * slots * (last_at - first_at) / (last - first),
        "candidates": last - 1,
        "slots": slots,
        "whole_seconds": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.candidates, given.algorithm)
    print(f"{platform.machine()}, {found['slots']:.0f} slots, {found['candidates']:.0f} empty candidates:")
    print(
        f"{found['slot_ms']:.1f} ms of slot time a candidate ({found['whole_seconds']:.1f} s from launch to report)"
    )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
