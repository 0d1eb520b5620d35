"""Packed tables, and rounding errors mended by low rank: what several techniques share."""

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
def outputs(model: Model) -> Tensor:
    found = model.module(TOKENS[:2])
    return found.logits if model.task == "causal-lm" else found.last_hidden_state


def written(model: Model, folder: Path) -> Model:
    """The model written and read again, after its file was held against its layout."""
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
    made = step.compress(loading.load(folder), context(tmp_path))
    assert made.layout() == step.output_layout(original)
    assert made.layout().size_bytes() < Rtn(bits=8).output_layout(original).size_bytes()
    again = written(made, tmp_path / "made")
    assert again.layout() == made.layout()
    assert torch.equal(outputs(again), outputs(made))
    run = on_torch.load(tmp_path / "made")
    assert not any(
        isinstance(part, (PackedEmbedding, PackedLinear, TiedHead)) for part in run.module.modules()
    )
    torch.testing.assert_close(outputs(run), outputs(made), rtol=0.02, atol=0.02)
    if bits == 8:
        before = outputs(loading.load(folder))
        assert (outputs(made) - before).norm() < 0.05 * before.norm()


def test_a_tied_table_is_written_once_and_serves_both_ends(tiny_llama: Path, tmp_path: Path) -> None:
    made = Rtn(embedding_bits=4, group=32).compress(loading.load(tiny_llama), context(tmp_path))
    assert made.layout().tables == {
        "model.embed_tokens": LinearSpec(512, 64, False, Packing(4, 32, symmetric=False))
    }
    assert not [name for name in made.layout().tensors() if name.startswith("lm_head")]
    again = written(made, tmp_path / "made")
    head = again.module.lm_head
    assert isinstance(head, TiedHead)
    assert head.table is again.module.model.embed_tokens
    run = on_torch.load(tmp_path / "made").module
    assert run.lm_head.weight is run.model.embed_tokens.weight


def test_a_head_of_its_own_is_packed_with_its_bias(tiny: object, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("tiny")("phi")
    model = loading.load(folder)
    nn.init.normal_(model.module.lm_head.bias)
    bias = model.module.lm_head.bias.clone()
    made = Rtn(embedding_bits=8).compress(model, context(folder))
    assert made.layout().tables["lm_head"] == LinearSpec(512, 64, True, Packing(8, 0, False))
    assert torch.equal(made.module.lm_head.bias, bias)


def test_a_tied_head_keeps_a_bias_of_its_own(
    words: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = transformers.GPTJConfig(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, tie_word_embeddings=True
    )
    original = transformers.GPTJForCausalLM(config)
    nn.init.normal_(original.lm_head.bias)
    original.save_pretrained(tmp_path / "original")
    step = Rtn(embedding_bits=8)
    made = step.compress(loading.load(tmp_path / "original"), context(tmp_path))
    assert made.layout() == step.output_layout(loading.original_layout(tmp_path / "original"))
    assert "lm_head.bias" in made.layout().others
    again = written(made, tmp_path / "made")
    assert torch.equal(outputs(again), outputs(made))
    assert torch.equal(on_torch.load(tmp_path / "made").module.lm_head.bias, made.module.lm_head.bias)


def test_a_packed_embedding_gives_the_rows_of_its_table(tiny: object, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("tiny")("gemma3_text")
    model = loading.load(folder)
    plain = model.module.model.embed_tokens
    made = Rtn(embedding_bits=8).compress(model, context(folder)).module.model.embed_tokens
    assert isinstance(made, PackedEmbedding)
    expected = made.weight(torch.bfloat16)[TOKENS] * plain.embed_scale.to(torch.bfloat16)
    assert torch.equal(made(TOKENS), expected)
    assert plain.weight is not None  # the plain one is left as it was


def test_each_value_of_a_table_is_the_nearest_of_a_grid_no_worse_than_the_widest(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = loading.load(tiny_llama)
    weight = model.module.model.embed_tokens.weight.float()
    known = Packing(4, 32, False)
    integers, grid = packing.round_to_nearest(weight, known)
    widest = grid.values(grids.grouped(integers, known)).flatten(1)[:, : weight.shape[1]]
    made = Rtn(embedding_bits=4, group=32).compress(model, context(tmp_path)).module.model.embed_tokens
    errors = [(each - weight).view(512, 2, 32).square().sum(-1) for each in (made.weight(), widest)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < errors[1].sum()


def test_tables_that_are_not_finite_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    model.module.model.embed_tokens.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"rtn needs finite weights: model\.embed_tokens"):
        Rtn(embedding_bits=8).compress(model, context(tmp_path))


def gram_of(into: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rank or 3 * into, into, generator=generator) @ torch.randn(
        into, into, generator=generator
    )
    return x.T @ x / len(x)


def cost(difference: Tensor, gram: Tensor) -> float:
    return (difference @ gram * difference).sum().item()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_low_rank_factors_leave_what_the_singular_values_leave(shape: tuple[int, int]) -> None:
    matrix, gram = torch.randn(shape, generator=torch.Generator().manual_seed(0)), gram_of(shape[1])
    values = torch.linalg.svdvals(matrix.double() @ torch.linalg.cholesky(gram.double()))
    for rank in (1, 5, 12):
        u, v = best_factors(matrix, gram, rank)
        assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
        left = values[rank:].square().sum().item()
        assert cost(matrix - u @ v, gram) == pytest.approx(left, rel=1e-3, abs=1e-4 * values[0].item())


def test_without_statistics_low_rank_factors_are_the_plain_truncation() -> None:
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    made = torch.mm(*best_factors(matrix, None, 3))
    assert torch.allclose(made, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_singular_gram_or_nothing_to_mend_does_no_harm(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gram = gram_of(shape[1], rank=4)
    assert cost(matrix - torch.mm(*best_factors(matrix, gram, 6)), gram) < 1e-4 * cost(matrix, gram)
    for product in (best_factors(matrix * 0, gram, 3), best_factors(matrix, gram * 0, 3)):
        assert all(torch.isfinite(factor).all() for factor in product)


@pytest.mark.parametrize("technique", [Rtn, Gptq])
def test_a_correction_mends_more_the_higher_its_rank(
    technique: type[Rtn] | type[Gptq], tiny_llama: Path, tmp_path: Path
) -> None:
    grams = Statistics(None, "").grams(loading.load(tiny_llama), TOKENS, lambda share, what: None)
    name = "model.layers.1.mlp.down_proj"
    gram = grams.gram(name) if "calibration" in technique.needs else torch.eye(160)
    weight = loading.load(tiny_llama).module.get_submodule(name).weight.float()
    errors = []
    for rank in (0, 4, 16, 32):
        step = technique(bits=3, correction_rank=rank)
        made = step.compress(loading.load(tiny_llama), context(tmp_path))
        assert made.layout() == step.output_layout(loading.original_layout(tiny_llama))
        errors.append(cost(effective(made.module.get_submodule(name)) - weight, gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def effective(layer: nn.Module) -> Tensor:
    if isinstance(layer, PackedLinear):
        return layer.weight()
    assert isinstance(layer, CorrectedLinear)
    return layer.rounded.weight() + layer.u.weight.float() @ layer.v.weight.float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox"])
def test_a_corrected_model_is_written_and_read_again(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("tiny")(family)
    step = Gptq(bits=3, correction_rank=8, embedding_bits=8)
    made = step.compress(loading.load(folder), context(tmp_path))
    again = written(made, tmp_path / "made")
    assert again.layout() == made.layout() == step.output_layout(loading.original_layout(folder))
    assert torch.equal(outputs(again), outputs(made))
    torch.testing.assert_close(outputs(on_torch.load(tmp_path / "made")), outputs(made), rtol=0.02, atol=0.02)


def test_thin_linears_are_packed_without_a_correction(tiny_llama: Path, tmp_path: Path) -> None:
    model = SvdLlm(keep=0.6).compress(loading.load(tiny_llama), context(tmp_path))
    factored = model.layout()
    step = Rtn(correction_rank=8)
    made = step.compress(model, context(tmp_path))
    assert made.layout() == step.output_layout(factored) == factored.packed(step.packing)


def test_a_rank_above_the_smaller_side_is_refused(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    with pytest.raises(ValueError, match=r"gptq\.correction_rank=33 is outside \[0, 32\]: .*k_proj"):
        Gptq(correction_rank=33).output_layout(layout)
