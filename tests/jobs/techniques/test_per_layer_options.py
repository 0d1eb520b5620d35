"""Options that differ by block have one spelling and exact sizes, and models are assembled from stored levels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.knobs import Choice, Range, profile, profile_values
from jobs.models import loading
from jobs.techniques.gptq import Gptq
from jobs.techniques.prune_ffn import PruneFfn
from jobs.techniques.rtn import Rtn

PACKING = [name for name in techniques.names() if "bits" in techniques.load(name).by_block]


def context_for(folder: Path | None) -> Context:
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    return Context(Statistics(folder, "parent"), Path(), seed=0, calibration=tokens)


def state_of(model: loading.Model) -> dict[str, torch.Tensor]:
    return dict(model.module.state_dict())


@pytest.mark.parametrize(
    ("values", "spelled"),
    [
        ([4], 4),
        ([4, 4, 4], 4),
        ([8, 4], "8 4"),
        ([8, 8, 4, 4], "8 4"),
        ([8, 8, 8, 4, 4, 4, 2, 2, 2], "8 4 2"),
        ([8, 4, 8, 4], "8 4 8 4"),
        ([8, 4, 4], "8 4 4"),
        ([0.25, 0.5], "0.25 0.5"),
    ],
)
def test_a_profile_is_spelled_with_the_fewest_values(values: list[float], spelled: object) -> None:
    assert profile(values) == spelled


def test_the_values_of_a_profile_must_be_in_the_domain() -> None:
    assert profile_values("8 4", Choice((2, 4, 8))) == (8, 4)
    assert profile_values("0.5 1", Range(0, 1)) == (0.5, 1.0)
    with pytest.raises(ValueError, match="5 is outside"):
        profile_values("8 5", Choice((2, 4, 8)))
    with pytest.raises(ValueError, match="x is outside"):
        profile_values("x 5", Choice((2, 4, 8)))


def test_a_profile_of_equal_values_equals_the_uniform_step() -> None:
    assert Rtn(bits="4 4 4 4") == Rtn(bits=4)
    assert Rtn(bits="8 8 4 4") == Rtn(bits="8 4")
    assert "bits=8 4" in str(Rtn(bits="8 8 4 4"))


def test_a_profile_of_a_global_option_or_with_an_invalid_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rtn.group='32 64' is outside"):
        Rtn(group="32 64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rtn.bits='8 5': 5 is outside"):
        Rtn(bits="8 5")


def test_values_are_spread_over_the_blocks_and_too_many_are_refused(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    for spelled, bits in (("8 2", [8, 8, 2, 2]), ("8 4 2 3", [8, 4, 2, 3])):
        predicted = Rtn(bits=spelled).output_layout(layout)
        packings = {predicted.block_of(name): spec.packing for name, spec in predicted.linears.items()}
        assert [packing.bits for _, packing in sorted(packings.items()) if packing is not None] == bits
    bits_by_linear = [8, 4, 2, 3, 4, 4, 4] + [4] * 20 + [3]
    specs = Rtn(bits=" ".join(map(str, bits_by_linear))).output_layout(layout).linears.values()
    assert [spec.packing.bits for spec in specs if spec.packing is not None] == bits_by_linear
    with pytest.raises(ValueError, match=r"rtn.bits has 29 values, but the model has 28 linears"):
        Rtn(bits=" ".join(map(str, [*bits_by_linear, 2]))).output_layout(layout)


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize(
    "options",
    [{}, {"embedding_bits": 8}, {"correction_rank": "0 4"}, {"bits": "2 4 8 3 2 3 8 " * 3 + "8 8 2 2 4 4 3"}],
)
def test_the_size_is_predicted_to_the_byte(
    name: str, options: dict[str, int | str], tiny_llama: Path, tmp_path: Path
) -> None:
    step = techniques.load(name).of({"bits": "8 4 2 3", "group": 32, **options})
    expected = step.output_layout(loading.original_layout(tiny_llama))
    compressed = step.compress(loading.load(tiny_llama), context_for(None))
    assert compressed.layout() == expected
    loading.save(compressed, tmp_path / "made", {})
    assert (tmp_path / "made" / loading.WEIGHTS).stat().st_size == expected.size_bytes()
    loaded_state = state_of(loading.load(tmp_path / "made"))
    assert all(loaded_state[part].equal(tensor) for part, tensor in state_of(compressed).items())


def test_feed_forward_layers_may_have_different_widths(tiny_llama: Path, tmp_path: Path) -> None:
    step = PruneFfn(ratio="0 0.5 0.25 0.5")
    expected = step.output_layout(loading.original_layout(tiny_llama))
    compressed = step.compress(loading.load(tiny_llama), context_for(None))
    assert compressed.layout() == expected
    widths = [
        expected.linears[expected.name(block, feed_forward.out)].in_features
        for block, feed_forward in expected.feed_forwards()
    ]
    assert widths == [160, 80, 120, 80]
    loading.save(compressed, tmp_path / "made", {})
    assert (tmp_path / "made" / loading.WEIGHTS).stat().st_size == expected.size_bytes()
    tokens = torch.arange(3, 35).unsqueeze(0)
    assert loading.load(tmp_path / "made").answer(tokens).equal(compressed.answer(tokens))
    with pytest.raises(ValueError, match=r"prune_ffn.ratio has 5 values, but the model has 4 blocks"):
        PruneFfn(ratio="0 0.5 0 0.5 0").output_layout(loading.original_layout(tiny_llama))


@pytest.mark.parametrize("name", PACKING)
def test_every_block_equals_that_of_the_uniform_model_with_its_bits(name: str, tiny_llama: Path) -> None:
    mixed = techniques.load(name).of({"bits": "8 4 3 4"})
    mixed_state = state_of(mixed.compress(loading.load(tiny_llama), context_for(None)))
    for bits in (8, 4, 3):
        uniform = techniques.load(name).of({"bits": bits})
        uniform_state = state_of(uniform.compress(loading.load(tiny_llama), context_for(None)))
        for block, block_bits in enumerate((8, 4, 3, 4)):
            parts = [part for part in uniform_state if f".layers.{block}." in part and block_bits == bits]
            assert all(mixed_state[part].equal(uniform_state[part]) for part in parts)


def test_gptq_assembled_from_stored_levels_equals_a_fresh_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Gptq(bits="8 4 2 3", embedding_bits=8, correction_rank="4 0 0 2")
    fresh = state_of(step.compress(loading.load(tiny_llama), context_for(None)))
    first = dataclasses.replace(step, bits="2 3 4 8", correction_rank=0)
    first.compress(loading.load(tiny_llama), context_for(tmp_path))
    rounding = "jobs.techniques.gptq.quantize"
    monkeypatch.setattr(rounding, lambda *_: pytest.fail("a level was computed twice"))
    assembled = state_of(step.compress(loading.load(tiny_llama), context_for(tmp_path)))
    assert assembled.keys() == fresh.keys()
    assert all(assembled[part].equal(fresh[part]) for part in fresh)


@pytest.mark.parametrize("bits", ["8 2", "2 4 8 3 2 3 8 " * 3 + "8 8 2 2 4 4 3"])
def test_sequential_gptq_supports_different_bits_by_block(bits: str, tiny_llama: Path) -> None:
    step = Gptq(bits=bits, sequential=True)
    compressed = step.compress(loading.load(tiny_llama), context_for(None))
    assert compressed.layout() == step.output_layout(loading.original_layout(tiny_llama))
