"""The format safetensors writes an ordinary model: stock transformers loads it and computes the same outputs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.formats import to_safetensors
from jobs.models import families
from jobs.models.families import Task
from jobs.models.layout import Layout

Steps = tuple[tuple[str, dict[str, object]], ...]
CLASSES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
TOLERANCE = 1e-5
"""Absolute tolerance of logits, which spread by 0.2: both sides compute in fp32 on the same bf16 weights."""


@dataclass(frozen=True)
class Case:
    family: str
    task: Task
    steps: Steps


DENSE: dict[str, Steps] = {
    "as it is": (),
    "fewer neurons": (("prune_ffn", {"ratio": 0.4}),),
    "chain": (("drop_layers", {"count": 2}), ("prune_ffn", {"ratio": 0.4}), ("magnitude", {"sparsity": 0.5})),
}
NARROWER: Steps = (
    ("drop_layers", {"count": 1}),
    ("prune_heads", {"ratio": 0.5}),
    ("prune_hidden", {"ratio": 0.5}),
)
CASES = {
    **{
        f"{family}, {kind}": Case(family, families.family(family).tasks[0], steps)
        for family in families.names()
        for kind, steps in DENSE.items()
    },
    **{
        f"{family}, narrower": Case(family, "causal-lm", NARROWER)
        for family in ("llama", "mistral", "qwen2", "qwen3", "phi")
    },
    **{f"{family} classifier": Case(family, "classification", ()) for family in ("llama", "bert", "gpt2")},
    "llama, biases": Case("llama", "causal-lm", (("prune_ffn", {"ratio": 0.4, "correction": "bias"}),)),
}


@pytest.fixture(scope="module")
def answers(artifact, compared) -> Any:
    """The outputs of every case."""
    artifacts = {name: artifact(case.family, case.steps, case.task) for name, case in CASES.items()}
    return compared(
        "safetensors", artifacts, {name: {"class": CLASSES[case.task]} for name, case in CASES.items()}
    )


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_the_same_outputs(name: str, answers: Any) -> None:
    torch.testing.assert_close(answers.stock[name], answers.ours[name], rtol=0, atol=TOLERANCE)


def test_the_config_states_the_heads(answers: Any) -> None:
    config = json.loads((answers.exports["llama, narrower"] / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (1, 2, 16)
    assert config["hidden_size"] == 32


@pytest.mark.parametrize(
    ("family", "steps", "reason"),
    [
        ("llama", (("svd", {"keep": 0.5}),), r"factorizing left model\.layers\.0\.self_attn"),
        ("llama", (("rtn", {"bits": 4, "group": 32}),), r"4-bit integers in model\.layers\.0\.self_attn"),
        ("gpt2", (("prune_heads", {"ratio": 0.5}),), r"transformer\.h\.0\.attn\.c_proj reads heads"),
        ("qwen2", (("prune_ffn", {"ratio": 0.4, "correction": "bias"}),), r"mlp\.down_proj has a bias"),
    ],
)
def test_a_refusal_names_the_linear_that_no_config_describes(
    family: str, steps: Steps, reason: str, artifact: Callable[..., Path]
) -> None:
    layout = Layout.read(artifact(family, steps))
    assert re.search(reason, to_safetensors.refusal(layout) or "")


def test_a_refusal_names_the_linear_of_another_width(artifact: Callable[..., Path]) -> None:
    layout = Layout.read(artifact("llama", ()))
    name = "model.layers.2.mlp.up_proj"
    narrow = dataclasses.replace(layout.linears[name], out_features=96)
    reason = to_safetensors.refusal(layout.with_linears({name: narrow}))
    assert reason is not None
    assert f"{name} is 96 by 64 where that of block 0 is 160 by 64" in reason
