"""What `compressed-tensors` writes is read by the library of that name, to the very integers and scales."""

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
"""Of logits, which spread by 0.2. The library multiplies in the scales' fp16 where we do in fp32, and a packed
embedding is written in bf16."""


@pytest.fixture(scope="module")
def everything(artifact, hear) -> Any:
    made = {name: artifact(family, steps) for name, (family, steps) in CASES.items()}
    how = {
        name: {
            "class": "AutoModel" if family == "bert" else "AutoModelForCausalLM",
            # transformers 5.23 expects zero points of another shape than the library writes, but so.
            "dequantize": "zeros" in name,
        }
        for name, (family, _) in CASES.items()
    }
    return hear("compressed-tensors", made, how)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_says_what_ours_says(name: str, everything: Any) -> None:
    torch.testing.assert_close(everything.heard[name], everything.said[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_our_very_weights(name: str, everything: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((everything.written[name] / "config.json").read_text())["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(everything.written[name] / "model.safetensors")
    linears = loading.load(everything.made[name]).linears()
    for scheme in schemes.values():
        for target in scheme.targets:
            held = {
                part.removeprefix(f"{target}."): tensor
                for part, tensor in tensors.items()
                if part.startswith(f"{target}.weight_")
            }
            held["weight_scale"] = held["weight_scale"].float()
            ours = linears.pop(target)
            assert isinstance(ours, PackedLinear)
            assert torch.equal(reader.decompress(held, scheme)["weight"], ours.weight())
    assert not any(isinstance(layer, PackedLinear) for layer in linears.values())


@pytest.mark.parametrize(
    ("family", "steps", "reason"),
    [
        ("llama", (), "no linear of its blocks is quantized"),
        ("llama", (("rtn", {"bits": 3, "group": 32}),), "3-bit integers"),
        ("llama", (("rtn", {"bits": 4, "group": 128}),), "groups of 128, which do not divide its 64 inputs"),
        ("llama", (("hqq", {"bits": 4, "group": 32}),), "zero points that are not whole"),
        ("llama", (("awq", {"bits": 4, "group": 32}),), "a scale per input"),
        ("llama", (("smoothquant", {}),), "rounding its activations to 8 bits"),
        ("gpt2", (("rtn", {"bits": 4, "group": 32}),), "Conv1D"),
        ("llama", (("svd", {"keep": 0.5}), ("rtn", {"bits": 8, "group": 0})), "thin linears"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    family: str, steps: Steps, reason: str, artifact: Callable[..., Path]
) -> None:
    assert reason in (to_compressed_tensors.refusal(Layout.read(artifact(family, steps))) or "")
