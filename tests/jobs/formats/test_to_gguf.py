"""The library gguf reads exactly the integers and scales that the format writes; stock transformers runs the file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.formats import gguf_blocks, gguf_tokenizer, to_gguf
from jobs.models import loading
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear
from jobs.models.layout import Layout, LinearSpec, Packing

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs pip install gguf")
Steps = tuple[tuple[str, dict[str, object]], ...]
FOUR: Steps = (("rtn", {"bits": 4, "group": 32, "symmetric": True}),)

CASES: dict[str, tuple[str, Steps]] = {
    **{f"{family}, as it is": (family, ()) for family in ("llama", "mistral", "qwen2", "qwen3")},
    **{f"{family}, 4 bits": (family, FOUR) for family in ("llama", "mistral", "qwen2", "qwen3")},
    "4 bits, zeros": ("llama", (("gptq", {"bits": 4, "group": 64}),)),
    "4 bits, real zeros": ("llama", (("hqq", {"bits": 4, "group": 32}),)),
    "4 bits, uneven groups": ("llama", (("rtn", {"bits": 4, "group": 128, "symmetric": True}),)),
    "3 bits, zeros": ("qwen2", (("gptq", {"bits": 3, "group": 32}),)),
    "2 bits, rows": ("llama", (("rtn", {"bits": 2, "group": 0, "symmetric": True}),)),
    "8 bits": ("llama", (("rtn", {"bits": 8, "group": 64, "symmetric": True, "embedding_bits": 4}),)),
    "packed embedding": ("llama", (("rtn", {"bits": 4, "group": 32, "embedding_bits": 8}),)),
    "sparse": ("llama", (("magnitude", {"sparsity": 0.5}),)),
    "chain": ("mistral", (("drop_layers", {"count": 1}), ("prune_ffn", {"ratio": 0.4}), *FOUR)),
    "narrower": ("llama", (("prune_heads", {"ratio": 0.5}), ("prune_hidden", {"ratio": 0.5}), *FOUR)),
}
READ = [name for name, (family, _) in CASES.items() if family != "qwen3"]
"""The cases that transformers reads: it assumes heads of 128 in a qwen3, although the file states their width."""
EXACT, ROUNDED = 1e-5, 0.004
"""Absolute tolerances of logits, which spread by 0.2, computed in fp32 on both sides. Zero points of 4-bit integers
become fp16 minima, and an 8-bit embedding with zero points is written in bf16."""


@pytest.fixture(scope="module")
def answers(artifact, compared) -> Any:
    artifacts = {name: artifact(family, steps) for name, (family, steps) in CASES.items()}
    return compared(
        "gguf",
        artifacts,
        {name: {"class": "AutoModelForCausalLM", "gguf": to_gguf.GGUF_FILE} for name in READ},
    )


def rounded(name: str) -> bool:
    return ("zeros" in name and "3 bits" not in name) or name == "packed embedding"


def weight_of(layer: nn.Module) -> Tensor:
    if isinstance(layer, (PackedLinear, SparseLinear)):
        return layer.weight().float()
    return layer.get_parameter("weight").float()


@pytest.mark.parametrize("name", READ)
def test_stock_transformers_computes_the_same_outputs(name: str, answers: Any) -> None:
    tolerance = ROUNDED if rounded(name) else EXACT
    torch.testing.assert_close(answers.stock[name], answers.ours[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_exactly_the_same_weights(name: str, answers: Any) -> None:
    import gguf

    file = gguf.GGUFReader(answers.exports[name] / to_gguf.GGUF_FILE)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    model = loading.load(answers.artifacts[name])
    layout = model.layout()
    gguf_names = {"o_proj": "attn_output", "v_proj": "attn_v", "down_proj": "ffn_down", "up_proj": "ffn_up"}
    compared = 0
    for full, layer in model.linears().items():
        short = gguf_names.get(full.rpartition(".")[2])
        if short is None:
            continue  # queries and keys have another order, which the logits test
        tensor = tensors[f"blk.{layout.block_of(full)}.{short}.weight"]
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        ours = weight_of(layer)
        if rounded(name):
            # A minimum is off by at most half of its last of 11 digits: 15 steps of 2**-12 each.
            steps = layer.scales.float().amax() if isinstance(layer, PackedLinear) else torch.tensor(0.0)
            assert (read - ours).abs().max() <= 15 * 2**-11 * steps
        else:
            assert torch.equal(read, ours)
        compared += 1
    assert compared == 4 * layout.depth


def test_blocks_contain_the_integers_of_a_row() -> None:
    """By hand: one row of 32, scale 0.5, q = 0 … 15 twice; the low halves of the bytes are the first 16."""
    packing = Packing(4, 32, True)
    integers = torch.arange(32).remainder(16).unsqueeze(0)
    layer = PackedLinear.of(integers, torch.tensor([[0.5]]), None, packing, None)
    tensors = {"packed": layer.packed, "scales": layer.scales}
    blocks = gguf_blocks.blocks_of(
        gguf_blocks.Q4_0, LinearSpec(1, 32, False, packing), tensors, torch.tensor([0])
    )
    half = list(torch.tensor([0.5], dtype=torch.float16).view(torch.uint8))
    assert blocks.flatten().tolist() == [*half, *(value | value << 4 for value in range(16))]


def test_an_embedding_is_packed_if_a_block_type_can_represent_its_zero_points(answers: Any) -> None:
    import gguf

    kinds = {}
    for name in ("8 bits", "packed embedding"):
        file = gguf.GGUFReader(answers.exports[name] / to_gguf.GGUF_FILE)
        kinds[name] = next(t.tensor_type.name for t in file.tensors if t.name == "token_embd.weight")
        table = next(iter(loading.load(answers.artifacts[name]).tables().values()))
        assert isinstance(table, PackedEmbedding)
    assert kinds == {"8 bits": "Q4_0", "packed embedding": "BF16"}


@pytest.mark.parametrize(
    ("family", "steps", "reason"),
    [
        ("gpt2", (), "a gpt2 is not among the families"),
        ("bert", (), "a bert is not among the families"),
        ("llama", (("rtn", {"bits": 8, "group": 32}),), "8-bit integers with zero points"),
        ("llama", (("awq", {"bits": 4, "group": 32}),), "a scale per input"),
        ("llama", (("svd", {"keep": 0.5}),), "thin linears"),
        ("qwen2", (("prune_heads", {"ratio": 0.5}),), "the heads of a qwen2"),
        ("llama", (("prune_ffn", {"ratio": 0.1}), *FOUR), "rows of 144, which are not whole blocks"),
    ],
)
def test_models_that_the_format_cannot_represent_are_refused(
    family: str, steps: Steps, reason: str, artifact: Callable[..., Path]
) -> None:
    assert reason in (to_gguf.refusal(Layout.read(artifact(family, steps))) or "")


def tokenizer_file(folder: Path, **parts: object) -> Path:
    plain = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps({**plain, **parts}))
    return folder


def test_every_row_of_the_embedding_has_a_token(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer.read_tokenizer(tokenizer_file(tmp_path), 5)
    assert tokenizer.tokens == ["a", "b", "<s>", "[PAD3]", "[PAD4]"]
    assert tokenizer.types == [
        gguf_tokenizer.NORMAL,
        gguf_tokenizer.NORMAL,
        gguf_tokenizer.CONTROL,
        gguf_tokenizer.UNUSED,
        gguf_tokenizer.UNUSED,
    ]
    assert (tokenizer.kind, tokenizer.pre_tokenizer) == ("gpt2", "gpt-2")


def test_sentencepiece_tokens_get_scores_in_the_order_of_ids(tmp_path: Path) -> None:
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>",
             "vocab": {"<unk>": 0, "<0x0A>": 1, "▁a": 2}, "merges": []}  # fmt: skip
    tokenizer = gguf_tokenizer.read_tokenizer(
        tokenizer_file(tmp_path, model=model, added_tokens=[], normalizer={"type": "Prepend"}), 3
    )
    assert tokenizer.types == [gguf_tokenizer.UNKNOWN, gguf_tokenizer.BYTE, gguf_tokenizer.NORMAL]
    assert tokenizer.scores == [0.0, -1.0, -2.0]
    assert (tokenizer.kind, tokenizer.adds_space_prefix) == ("llama", True)


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="splits text by Whitespace, which is none of llama"):
        gguf_tokenizer.read_tokenizer(tokenizer_file(tmp_path, pre_tokenizer={"type": "Whitespace"}), 5)
    with pytest.raises(ValueError, match="the embedding has 2 rows"):
        gguf_tokenizer.read_tokenizer(tokenizer_file(tmp_path), 2)
