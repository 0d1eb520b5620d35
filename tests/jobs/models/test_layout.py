from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.layout import Layout, LinearSpec, Packing, TensorSpec, safetensors_bytes
from jobs.recipe import Origin, Recipe
from jobs.technique import Technique


def test_a_packed_linear_is_stored_in_integers_scales_and_zero_points() -> None:
    tensors = LinearSpec(4, 100, True, Packing(3, 64, symmetric=False)).tensors()
    assert {name: spec.shape for name, spec in tensors.items()} == {
        "packed": (4, 39),  # 13 eights of 3 bytes
        "scales": (4, 2),
        "zeros": (4, 2),
        "bias": (4,),
    }


def test_a_group_of_zero_is_one_scale_per_row() -> None:
    assert Packing(4, 0, symmetric=True).groups(576) == 1
    assert Packing(4, 128, symmetric=True).groups(576) == 5


def test_the_size_of_a_file_counts_escaped_names_in_its_header(tmp_path: Path) -> None:
    tensors = {
        'quoted "name"': torch.zeros(3, 5, dtype=torch.bfloat16),
        "größe": torch.zeros(7, dtype=torch.int64),
        "ring.10": torch.zeros(()),
        "ring.9": torch.zeros(2, 0, dtype=torch.uint8),
    }
    names = {torch.bfloat16: "BF16", torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}
    save_file(tensors, tmp_path / "some", {"format": "pt"})
    specs = {name: TensorSpec(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert safetensors_bytes(specs) == (tmp_path / "some").stat().st_size


def test_the_layout_of_an_original_follows_from_its_config(tiny_llama: Path, tiny_bert: Path) -> None:
    for folder in (tiny_llama, tiny_bert):
        assert loading.original_layout(folder) == loading.load(folder).layout()


def test_a_layout_is_read_from_its_record_unchanged(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama).packed(Packing(4, 32, symmetric=False))
    assert Layout.from_dict(layout.to_dict()) == layout
    assert layout.forms() == {"dense", "packed"}
    assert loading.original_layout(tiny_llama).forms() == {"dense"}


def test_the_record_of_a_layout_has_the_keys_that_stored_artifacts_have(tiny_llama: Path) -> None:
    original = loading.original_layout(tiny_llama)
    name, spec = next(iter(original.linears.items()))
    sparse = LinearSpec(spec.out_features, spec.in_features, spec.bias, kept=7)
    packed = spec.packed(Packing(4, 32, symmetric=False))
    record = original.with_linears({name: sparse}).to_dict()
    assert list(record) == [
        "format", "family", "task", "blocks", "head_width", "queries_per_key", "linears", "others", "tables"
    ]  # fmt: skip
    assert record["linears"][name] == {
        "out_features": 64, "in_features": 64, "bias": False, "packing": None, "kept": 7,
    }  # fmt: skip
    assert record["others"]["model.norm.weight"] == {"dtype": "BF16", "shape": (64,)}
    assert original.with_linears({name: packed}).to_dict()["linears"][name]["packing"] == {
        "bits": 4, "group": 32, "symmetric": False,
        "real_zeros": False, "input_scales": False, "activation_bits": 16,
    }  # fmt: skip


def steps_at_random(dice: random.Random) -> tuple[Technique, ...]:
    """Return a random recipe in a sensible order; each stage may be skipped."""
    load = techniques.load
    packing = {"bits": dice.choice((2, 3, 4, 8)), "group": dice.choice((0, 32, 64, 128)),
               "symmetric": dice.random() < 0.5, "embedding_bits": dice.choice((16, 8, 4)),
               "correction_rank": dice.choice((0, 4))}  # fmt: skip
    stages = (
        load("drop_layers").of({"count": dice.randint(1, 2)}),
        load("prune_ffn").of(
            {"ratio": dice.uniform(0, 0.9), "correction": dice.choice(("none", "bias", "least_squares"))}
        ),
        load("svd_llm").of({"keep": dice.uniform(0.05, 0.99)}),
        load(dice.choice(("rtn", "gptq", "awq"))).of(packing),
    )
    return tuple(stage for stage in stages if dice.random() < 0.6)


@pytest.fixture(scope="module")
def tinier_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama so small that 200 compressions take seconds; its width is not a multiple of a group."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=40, intermediate_size=72, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tinier-llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_the_size_of_random_recipes_is_predicted_exactly(
    count: int, tinier_llama: Path, tmp_path: Path
) -> None:
    original = loading.original_layout(tinier_llama)
    tokens = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    dice = random.Random(0)
    for number in range(count):
        recipe = Recipe(Origin("model", "data", 0), steps_at_random(dice))
        model = loading.load(tinier_llama)
        for step in recipe.steps:
            model = step.compress(model, Context(Statistics(None, ""), tmp_path, 0, calibration=tokens))
        folder = tmp_path / str(number)
        loading.save(model, folder, {})
        assert recipe.layout(original).size_bytes() == (folder / loading.WEIGHTS).stat().st_size, str(recipe)


def test_a_step_that_cannot_be_applied_is_refused_by_the_layout(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    with pytest.raises(ValueError, match=r"drop_layers\.count=4 is outside \[0, 3\]"):
        techniques.load("drop_layers").of({"count": 4}).output_layout(layout)
