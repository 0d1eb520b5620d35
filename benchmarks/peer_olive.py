"""Olive's search over its passes on a classifier, for benchmarks/front.py; runs in an environment of its own.

python peer_olive.py MODEL ITEMS SEED THREADS OUT: MODEL is the classifier's folder, ITEMS the jsonl of texts and labels
to measure accuracy on. OUT receives a line of JSON for each measured model, until all are measured or the process is
ended. The script needs olive-ai 0.11, onnxruntime and requests: 0.13 cannot store a study with a user's metric.

The model is converted to ONNX. Olive tries all its passes for an encoder on a CPU: weights of 8 bits, of 4 or 8 bits in
blocks, by HQQ, of 16 bits; each with and without its optimizations for BERT, 48 models in all. Sampling is random: the
TPE sampler confuses the options of alternative passes, or always draws the first one. Olive has no pass that prunes,
factorizes or distils a BERT: SparseGPT and SliceGPT are for decoders. It tries one model at a time and caches the
output of passes, so a shared prefix runs once. Sessions compute on all THREADS.
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
"""Options of passes that a model's name states."""


def evaluate(
    model: Any, device: Any, providers: Any, items: str, tokenizer_folder: str, threads: int, out: str
) -> dict[str, float]:
    """Return the bytes of a model's files and its accuracy, in batches of one text. Olive calls this for each model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.model_path, options, providers=["CPUExecutionProvider"])
    input_names = [node.name for node in session.get_inputs()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    label_ids = transformers.AutoConfig.from_pretrained(tokenizer_folder).label2id
    texts = [json.loads(line) for line in Path(items).read_text().splitlines()]
    correct = []
    for text in texts:
        tokens = tokenizer(text["text"], truncation=True, max_length=510, return_tensors="np")
        logits = session.run(None, {name: tokens[name].astype(np.int64) for name in input_names})[0]
        correct.append(int(logits[0].argmax()) == label_ids[text["label"]])
    folder = Path(model.model_path).parent
    size_bytes = sum(file.stat().st_size for file in folder.iterdir() if ".onnx" in file.name)
    metrics = {"size_bytes": float(size_bytes), "accuracy": float(np.mean(correct))}
    with Path(out).open("a") as file:
        file.write(json.dumps({**metrics, "ended": time.time(), "recipe": _recipe(folder)}) + "\n")
    return metrics


def _recipe(folder: Path) -> str:
    """Return the passes that made the model of this folder, from the files that Olive writes next to its models."""
    steps: list[str] = []
    file = folder.parent / "run.json"
    while file.is_file():
        run = json.loads(file.read_text())
        options = {name: run["pass_config"].get(name) for name in OPTIONS if name in run["pass_config"]}
        steps.insert(
            0, f"{run['pass_name']}({', '.join(f'{name}={value}' for name, value in options.items())})"
        )
        file = file.parent.parent / str(run["input_model_id"]) / "run.json"
    return " → ".join(steps)


def weights() -> list[dict[str, Any]]:
    """Return every tried way to store the weights."""
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


def configuration(model: str, seed: int, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    metric = {
        "name": "front",
        "type": "custom",
        "user_config": {
            "user_script": str(Path(__file__).resolve()),
            "evaluate_func": "evaluate",
            "evaluate_func_kwargs": arguments,
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

    arguments = {"items": items, "tokenizer_folder": model, "threads": int(threads), "out": out}
    olive.workflows.run(configuration(model, int(seed), Path(out).parent, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
