"""Olive's search over its passes on a classifier, for benchmarks/front.py; runs in an environment of its own.

python peer_olive.py MODEL ITEMS SEED THREADS OUT: MODEL is the classifier's folder, ITEMS the jsonl of texts and labels
that accuracy is measured on. Each model that was measured is a line of JSON in OUT, until all are or it is ended.
Needs olive-ai 0.11, onnxruntime and requests: 0.13 cannot write down a study with a metric of one's own.

The model becomes ONNX, and Olive tries what its passes can do to an encoder on a CPU: weights of 8 bits, of 4 or 8 bits
in blocks, by HQQ, of 16 bits; each then optimized as a BERT or not, 48 models in all. It draws at random: its TPE
sampler mixes up the options of alternative passes, or draws the first one for ever. It has no pass that prunes,
factorizes or distils a BERT: SparseGPT and SliceGPT are for decoders. It tries one model at a time and keeps what
passes wrote, so that a shared prefix runs once; sessions compute on all THREADS.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import transformers

OPTIONS = ("precision", "per_channel", "reduce_range", "bits", "block_size", "is_symmetric")
"""Of passes, that a model's name tells."""


def evaluate(
    model: Any, device: Any, providers: Any, items: str, words: str, threads: int, out: str
) -> dict[str, float]:
    """What Olive calls of each model: its files' bytes, and how often it names a text's label. Texts run alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.model_path, options, providers=["CPUExecutionProvider"])
    asked = [given.name for given in session.get_inputs()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    known = transformers.AutoConfig.from_pretrained(words).label2id
    texts = [json.loads(line) for line in Path(items).read_text().splitlines()]
    right = []
    for text in texts:
        tokens = tokenizer(text["text"], truncation=True, max_length=510, return_tensors="np")
        logits = session.run(None, {name: tokens[name].astype(np.int64) for name in asked})[0]
        right.append(int(logits[0].argmax()) == known[text["label"]])
    folder = Path(model.model_path).parent
    size_bytes = sum(file.stat().st_size for file in folder.iterdir() if ".onnx" in file.name)
    found = {"size_bytes": float(size_bytes), "accuracy": float(np.mean(right))}
    with Path(out).open("a") as file:
        file.write(json.dumps({**found, "ended": time.time(), "recipe": _recipe(folder)}) + "\n")
    return found


def _recipe(folder: Path) -> str:
    """The passes that made the model of this folder, by what Olive notes beside its models."""
    steps: list[str] = []
    note = folder.parent / "run.json"
    while note.is_file():
        run = json.loads(note.read_text())
        chosen = {name: run["pass_config"].get(name) for name in OPTIONS if name in run["pass_config"]}
        steps.insert(
            0, f"{run['pass_name']}({', '.join(f'{name}={value}' for name, value in chosen.items())})"
        )
        note = note.parent.parent / str(run["input_model_id"]) / "run.json"
    return " → ".join(steps)


def weights() -> list[dict[str, Any]]:
    """Every way to store the weights that is tried."""
    dynamic = [
        {"type": "OnnxDynamicQuantization", "precision": precision, "per_channel": by_channel, "reduce_range": reduced,
         "quant_preprocess": True}
        for precision, by_channel, reduced in itertools.product(("int8", "uint8"), (True, False), (True, False))
    ]  # fmt: skip
    blocks = [
        {"type": "OnnxBlockWiseRtnQuantization", "bits": bits, "block_size": block, "is_symmetric": symmetric}
        for bits, block, symmetric in itertools.product((4, 8), (32, 64, 128), (True, False))
    ]
    hqq = [{"type": "OnnxHqqQuantization", "block_size": block} for block in (32, 64, 128)]
    return [*dynamic, *blocks, *hqq, {"type": "OnnxFloatToFloat16", "keep_io_types": True}]


def configuration(model: str, seed: int, folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    metric = {
        "name": "front",
        "type": "custom",
        "user_config": {
            "user_script": str(Path(__file__).resolve()),
            "evaluate_func": "evaluate",
            "evaluate_func_kwargs": told,
        },
        "sub_types": [
            {"name": "size_bytes", "priority": 1, "higher_is_better": False},
            {"name": "accuracy", "priority": 2, "higher_is_better": True},
        ],
    }
    return {
        "input_model": {"type": "HfModel", "model_path": model, "task": "text-classification"},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "evaluators": {"front": {"metrics": [metric]}},
        "passes": {
            "conversion": [{"type": "OnnxConversion"}],
            "weights": weights(),
            "graph": [
                {"type": "OrtTransformersOptimization", "model_type": "bert", "opt_level": 0},
                {"type": "OnnxPeepholeOptimizer"},
            ],
        },
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "random",
            "include_pass_params": False,
            "sampler_config": {"seed": seed, "max_samples": 0},
        },
        "evaluator": "front",
        "host": "here",
        "target": "here",
        "evaluate_input_model": False,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "models"),
    }


def main(model: str, items: str, seed: str, threads: str, out: str) -> None:
    import olive.workflows

    told = {"items": items, "words": model, "threads": int(threads), "out": out}
    olive.workflows.run(configuration(model, int(seed), Path(out).parent, told))


if __name__ == "__main__":
    main(*sys.argv[1:])
