"""One compression by llm-compressor, for benchmarks/peers.py; runs in an environment of its own.

python peer_llmcompressor.py MODEL ROWS RECIPE OUT: MODEL is a folder, ROWS a safetensors file of calibration
token ids, RECIPE JSON such as {"kind": "gptq", "bits": 4, "symmetric": false, "actorder": "static"}. The script writes
the weights of all block linears to OUT, in fp32, as the compressed model uses them.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def modifier(recipe: dict[str, Any]) -> Any:
    """Return the modifier of a recipe. Options that the recipe does not state have their defaults."""
    if recipe["kind"] == "gptq":
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import GPTQModifier

        weights = QuantizationArgs(
            num_bits=recipe["bits"], type="int", strategy="group", group_size=recipe["group"],
            symmetric=recipe["symmetric"],
        )  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        order = {"actorder": recipe["actorder"]} if recipe.get("actorder") else {}
        return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **order)
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[recipe["kind"]]
    return kind(sparsity=0.5, mask_structure=recipe["mask"], ignore=["re:.*lm_head"], targets=["Linear"])


def main(model: str, rows: str, recipe: str, out: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(rows)["rows"]
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    started = time.perf_counter()
    oneshot(
        model=module, tokenizer=AutoTokenizer.from_pretrained(model), dataset=data, recipe=modifier(json.loads(recipe)),
        num_calibration_samples=len(tokens), max_seq_length=tokens.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    weights = {
        name: part.weight.detach().float().contiguous()
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and ".layers." in name
    }
    save_file(weights, out, {"seconds": f"{seconds:.1f}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
