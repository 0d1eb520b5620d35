"""The library compressed-tensors reads exactly the integers and scales that the format writes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.formats import to_compressed_tensors
from jobs.models import loading
from jobs.models.layers import PackedLinear
from jobs.models.layout import Layout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs pip install compressed-tensors"
)
Steps = tuple[tuple[str, dict[str, object]], ...]

CASES: dict[str, tuple[str, Steps]] = {
    "4 bits": ("llama", (("rtn", {"bits": 4, "group": 32, "symmetric": True}),)),
    "4 bits, zeros": ("llama", (("gptq", {"bits": 4, "group": 32}),)),
    "8 bits, rows": ("qwen2", (("rtn", {"bits": 8, "group": 0, "symmetric": True}),)),
    "8 bits, rows, zeros": ("mistral", (("rtn", {"bits": 8, "group": 0}),)),
    "packed embedding": (
        "llama",
        (("rtn", {"bits": 4, "group": 32, "symmetric": True, "embedding_bits": 8}),),
    ),
    "encoder": ("bert", (("rtn", {"bits": 8, "group": 32, "symmetric": True}),)),
    "chain": (
        "llama",
        (
            ("drop_layers", {"count": 1}),
            ("prune_ffn", {"ratio": 0.2}),
            ("rtn", {"bits": 4, "group": 32, "symmetric": True}),
        ),
    ),
    "narrower": (
        "llama",
        (
            ("prune_hidden", {"ratio": 0.5}),
            ("prune_heads", {"ratio": 0.5}),
            ("rtn", {"bits": 4, "group": 32, "symmetric": True}),
        ),
    ),
}
TOLERANCE = 0.002
"""Absolute tolerance of logits, which spread by 0.2. The library multiplies in fp16, slimfront in fp32, and a packed
embedding is written in bf16."""


@pytest.fixture(scope="module")
def answers(artifact, compared) -> Any:
    artifacts = {name: artifact(family, steps) for name, (family, steps) in CASES.items()}
    options = {
        name: {
            "class": "AutoModel" if family == "bert" else "AutoModelForCausalLM",
            # transformers 5.23 expects zero points of another shape than the library writes, unless it dequantizes.
            "dequantize": "zeros" in name,
        }
        for name, (family, _) in CASES.items()
    }
    return compared("compressed-tensors", artifacts, options)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_the_same_outputs(name: str, answers: Any) -> None:
    torch.testing.assert_close(answers.stock[name], answers.ours[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_exactly_the_same_weights(name: str, answers: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((answers.exports[name] / "config.json").read_text())["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(answers.exports[name] / "model.safetensors")
    linears = loading.load(answers.artifacts[name]).linears()
    for scheme in schemes.values():
        for target in scheme.targets:
            stored = {
                part.removeprefix(f"{target}."): tensor
                for part, tensor in tensors.items()
                if part.startswith(f"{target}.weight_")
            }
            stored["weight_scale"] = stored["weight_scale"].float()
            ours = linears.pop(target)
            assert isinstance(ours, PackedLinear)
            assert torch.equal(reader.decompress(stored, scheme)["weight"], ours.weight())
    assert not any(isinstance(layer, PackedLinear) for layer in linears.values())


@pytest.mark.parametrize(
    ("family", "steps", "reason"),
    [
        ("llama", (), "no linear of its blocks is quantized"),
        ("llama", (("rtn", {"bits": 3, "group": 32}),), "3-bit integers"),
        ("llama", (("rtn", {"bits": 4, "group": 128}),), "groups of 128, which do not divide its 64 inputs"),
        ("llama", (("hqq", {"bits": 4, "group": 32}),), "zero points that are not integers"),
        ("llama", (("awq", {"bits": 4, "group": 32}),), "a scale per input"),
        ("llama", (("smoothquant", {}),), "rounding its activations to 8 bits"),
        ("gpt2", (("rtn", {"bits": 4, "group": 32}),), "Conv1D"),
        ("llama", (("svd", {"keep": 0.5}), ("rtn", {"bits": 8, "group": 0})), "thin linears"),
    ],
)
def test_models_that_the_format_cannot_represent_are_refused(
    family: str, steps: Steps, reason: str, artifact: Callable[..., Path]
) -> None:
    assert reason in (to_compressed_tensors.refusal(Layout.read(artifact(family, steps))) or "")
