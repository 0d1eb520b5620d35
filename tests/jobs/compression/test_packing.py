"""Packed embedding tables and low-rank corrections of rounding errors, which several techniques share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.compression import grids, packing
from jobs.compression.low_rank import best_factors
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.layers import CorrectedLinear, PackedEmbedding, PackedLinear, TiedHead
from jobs.models.layout import LinearSpec, Packing
from jobs.models.model import Model
from jobs.runtimes import on_torch
from jobs.techniques.gptq import Gptq
from jobs.techniques.rtn import Rtn
from jobs.techniques.svd_llm import SvdLlm

TOKENS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))


def context(workdir: Path) -> Context:
    return Context(Statistics(None, ""), workdir, 0, calibration=TOKENS)


@torch.no_grad()
def compute_outputs(model: Model) -> Tensor:
    output = model.module(TOKENS[:2])
    if model.task == "causal-lm":
        return output.logits
    return output.last_hidden_state


def write_and_load(model: Model, folder: Path) -> Model:
    """Write the model, compare the file's size with the layout, and load the model again."""
    loading.save(model, folder, {})
    assert (folder / loading.WEIGHTS).stat().st_size == model.layout().size_bytes()
    return loading.load(folder)


@pytest.mark.parametrize(
    ("family", "bits"), [*((name, 8) for name in families.names()), ("llama", 4), ("phi", 4), ("bert", 4)]
)
def test_tables_are_packed_in_every_family(
    family: str, bits: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("tiny")(family)
    step = Rtn(bits=8, embedding_bits=bits)
    original = loading.original_layout(folder)
    model = step.compress(loading.load(folder), context(tmp_path))
    assert model.layout() == step.output_layout(original)
    assert model.layout().size_bytes() < Rtn(bits=8).output_layout(original).size_bytes()
    loaded = write_and_load(model, tmp_path / "made")
    assert loaded.layout() == model.layout()
    assert torch.equal(compute_outputs(loaded), compute_outputs(model))
    runtime_model = on_torch.load(tmp_path / "made")
    assert not any(
        isinstance(part, (PackedEmbedding, PackedLinear, TiedHead)) for part in runtime_model.module.modules()
    )
    torch.testing.assert_close(compute_outputs(runtime_model), compute_outputs(model), rtol=0.02, atol=0.02)
    if bits == 8:
        original_outputs = compute_outputs(loading.load(folder))
        assert (compute_outputs(model) - original_outputs).norm() < 0.05 * original_outputs.norm()


def test_a_tied_table_is_written_once_for_embedding_and_head(tiny_llama: Path, tmp_path: Path) -> None:
    model = Rtn(embedding_bits=4, group=32).compress(loading.load(tiny_llama), context(tmp_path))
    assert model.layout().tables == {
        "model.embed_tokens": LinearSpec(512, 64, False, Packing(4, 32, symmetric=False))
    }
    assert not [name for name in model.layout().tensors() if name.startswith("lm_head")]
    loaded = write_and_load(model, tmp_path / "made")
    head = loaded.module.lm_head
    assert isinstance(head, TiedHead)
    assert head.table is loaded.module.model.embed_tokens
    runtime_module = on_torch.load(tmp_path / "made").module
    assert runtime_module.lm_head.weight is runtime_module.model.embed_tokens.weight


def test_an_untied_head_is_packed_with_its_bias(tiny: object, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("tiny")("phi")
    model = loading.load(folder)
    nn.init.normal_(model.module.lm_head.bias)
    bias = model.module.lm_head.bias.clone()
    packed = Rtn(embedding_bits=8).compress(model, context(folder))
    assert packed.layout().tables["lm_head"] == LinearSpec(512, 64, True, Packing(8, 0, False))
    assert torch.equal(packed.module.lm_head.bias, bias)


def test_a_tied_head_keeps_its_separate_bias(
    words: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = transformers.GPTJConfig(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, tie_word_embeddings=True
    )
    original = transformers.GPTJForCausalLM(config)
    nn.init.normal_(original.lm_head.bias)
    original.save_pretrained(tmp_path / "original")
    step = Rtn(embedding_bits=8)
    model = step.compress(loading.load(tmp_path / "original"), context(tmp_path))
    assert model.layout() == step.output_layout(loading.original_layout(tmp_path / "original"))
    assert "lm_head.bias" in model.layout().others
    loaded = write_and_load(model, tmp_path / "made")
    assert torch.equal(compute_outputs(loaded), compute_outputs(model))
    assert torch.equal(on_torch.load(tmp_path / "made").module.lm_head.bias, model.module.lm_head.bias)


def test_a_packed_embedding_returns_the_rows_of_its_table(
    tiny: object, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("tiny")("gemma3_text")
    model = loading.load(folder)
    plain = model.module.model.embed_tokens
    packed = Rtn(embedding_bits=8).compress(model, context(folder)).module.model.embed_tokens
    assert isinstance(packed, PackedEmbedding)
    expected = packed.weight(torch.bfloat16)[TOKENS] * plain.embed_scale.to(torch.bfloat16)
    assert torch.equal(packed(TOKENS), expected)
    assert plain.weight is not None  # the original embedding is unchanged


def test_a_table_is_rounded_to_a_grid_no_worse_than_the_widest(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    weight = model.module.model.embed_tokens.weight.float()
    options = Packing(4, 32, False)
    integers, grid = packing.round_to_nearest(weight, options)
    widest = grid.values(grids.grouped(integers, options)).flatten(1)[:, : weight.shape[1]]
    embedding = Rtn(embedding_bits=4, group=32).compress(model, context(tmp_path)).module.model.embed_tokens
    errors = [(table - weight).view(512, 2, 32).square().sum(-1) for table in (embedding.weight(), widest)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < errors[1].sum()


def test_non_finite_tables_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    model.module.model.embed_tokens.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"rtn needs finite weights: model\.embed_tokens"):
        Rtn(embedding_bits=8).compress(model, context(tmp_path))


def make_gram(into: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rank or 3 * into, into, generator=generator) @ torch.randn(
        into, into, generator=generator
    )
    return x.T @ x / len(x)


def output_error(difference: Tensor, gram: Tensor) -> float:
    return (difference @ gram * difference).sum().item()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_the_error_of_low_rank_factors_equals_that_of_the_omitted_singular_values(
    shape: tuple[int, int],
) -> None:
    matrix, gram = torch.randn(shape, generator=torch.Generator().manual_seed(0)), make_gram(shape[1])
    values = torch.linalg.svdvals(matrix.double() @ torch.linalg.cholesky(gram.double()))
    for rank in (1, 5, 12):
        u, v = best_factors(matrix, gram, rank)
        assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
        expected = values[rank:].square().sum().item()
        assert output_error(matrix - u @ v, gram) == pytest.approx(
            expected, rel=1e-3, abs=1e-4 * values[0].item()
        )


def test_without_statistics_low_rank_factors_are_the_truncated_svd() -> None:
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    product = torch.mm(*best_factors(matrix, None, 3))
    assert torch.allclose(product, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_singular_gram_and_zero_errors_give_finite_factors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gram = make_gram(shape[1], rank=4)
    assert output_error(matrix - torch.mm(*best_factors(matrix, gram, 6)), gram) < 1e-4 * output_error(
        matrix, gram
    )
    for factors in (best_factors(matrix * 0, gram, 3), best_factors(matrix, gram * 0, 3)):
        assert all(torch.isfinite(factor).all() for factor in factors)


@pytest.mark.parametrize("technique", [Rtn, Gptq])
def test_the_error_falls_as_the_rank_of_the_correction_rises(
    technique: type[Rtn] | type[Gptq], tiny_llama: Path, tmp_path: Path
) -> None:
    grams = Statistics(None, "").grams(loading.load(tiny_llama), TOKENS, lambda share, activity: None)
    name = "model.layers.1.mlp.down_proj"
    gram = torch.eye(160)
    if "calibration" in technique.needs:
        gram = grams.gram(name)
    weight = loading.load(tiny_llama).module.get_submodule(name).weight.float()
    errors = []
    for rank in (0, 4, 16, 32):
        step = technique(bits=3, correction_rank=rank)
        model = step.compress(loading.load(tiny_llama), context(tmp_path))
        assert model.layout() == step.output_layout(loading.original_layout(tiny_llama))
        errors.append(output_error(effective_weight(model.module.get_submodule(name)) - weight, gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def effective_weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, PackedLinear):
        return layer.weight()
    assert isinstance(layer, CorrectedLinear)
    return layer.rounded.weight() + layer.u.weight.float() @ layer.v.weight.float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox"])
def test_a_corrected_model_is_equal_after_loading(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("tiny")(family)
    step = Gptq(bits=3, correction_rank=8, embedding_bits=8)
    model = step.compress(loading.load(folder), context(tmp_path))
    loaded = write_and_load(model, tmp_path / "made")
    assert loaded.layout() == model.layout() == step.output_layout(loading.original_layout(folder))
    assert torch.equal(compute_outputs(loaded), compute_outputs(model))
    torch.testing.assert_close(
        compute_outputs(on_torch.load(tmp_path / "made")), compute_outputs(model), rtol=0.02, atol=0.02
    )


def test_thin_linears_are_packed_without_a_correction(tiny_llama: Path, tmp_path: Path) -> None:
    model = SvdLlm(keep=0.6).compress(loading.load(tiny_llama), context(tmp_path))
    factored = model.layout()
    step = Rtn(correction_rank=8)
    packed = step.compress(model, context(tmp_path))
    assert packed.layout() == step.output_layout(factored) == factored.packed(step.packing)


def test_a_rank_above_the_smaller_side_is_refused(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    with pytest.raises(ValueError, match=r"gptq\.correction_rank=33 is outside \[0, 32\]: .*k_proj"):
        Gptq(correction_rank=33).output_layout(layout)
