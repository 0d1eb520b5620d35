"""Fisher information of each task equals or approaches slow reference computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.compression.importance import fisher
from jobs.context import Context
from jobs.models import families, loading
from jobs.models.layers import SparseLinear
from jobs.models.model import Model

Tiny = Callable[..., Path]


def load_in_fp64(folder: Path) -> Model:
    """Load a model in fp64, so that squared gradients can be compared."""
    model = loading.load(folder)
    model.module.double()
    return model


def context(tokens: Tensor, workdir: Path) -> Context:
    return Context(Statistics(None, "key"), workdir, seed=0, calibration=tokens)


def make_tokens(samples: int, length: int) -> Tensor:
    return torch.randint(3, 512, (samples, length), generator=torch.Generator().manual_seed(0))


def sum_squared_gradients(model: Model, scalars: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """Return the sum over the scalars of their squared gradients, computed one by one with autograd."""
    model.module.requires_grad_(True)
    linears = model.linears()
    weights = [linears[name].get_parameter("weight") for name in linears]
    total = {name: torch.zeros_like(weight) for name, weight in zip(linears, weights, strict=True)}
    for scalar in scalars():
        for name, slope in zip(linears, torch.autograd.grad(scalar, weights, retain_graph=True), strict=True):
            total[name] += slope.square()
    model.module.requires_grad_(False)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_for_a_causal_model_fisher_is_the_mean_squared_gradient_per_sequence(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    tokens = make_tokens(3, 12)
    model = load_in_fp64(tiny(family))

    def losses() -> list[Tensor]:
        return [model.module(row.unsqueeze(0), labels=row.unsqueeze(0)).loss for row in tokens]

    actual = fisher(model, context(tokens, tmp_path))
    assert list(actual) == list(model.linears())
    for name, expected in sum_squared_gradients(model, losses).items():
        # transformers returns the mean over the 11 predicted tokens; the sum has a squared gradient 121 times as large.
        assert torch.allclose(actual[name].double(), expected * 121 / 11 / 3, rtol=1e-5)
    assert all(
        not parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters()
    )


def test_for_an_encoder_fisher_approaches_the_squared_jacobian_of_the_embedding(
    tiny_bert: Path, tmp_path: Path
) -> None:
    row = make_tokens(1, 6)
    model = load_in_fp64(tiny_bert)

    def coordinates() -> list[Tensor]:
        vector = model.module(row).last_hidden_state.mean(dim=1)[0]
        return list(vector / vector.norm())

    actual = fisher(model, context(row.repeat(300, 1), tmp_path))
    for name, expected in sum_squared_gradients(model, coordinates).items():
        assert actual[name].sum().item() == pytest.approx(expected.sum().item(), rel=0.15), name
        assert correlation(actual[name].double(), expected) > 0.97, name


def test_for_a_classifier_fisher_approaches_the_exact_value(tiny: Tiny, tmp_path: Path) -> None:
    row = make_tokens(1, 6)
    for family in ("bert", "llama"):
        model = load_in_fp64(tiny(family, "classification"))

        def by_label(model: Model = model) -> list[Tensor]:
            logs = model.module(row).logits[0].log_softmax(dim=-1)
            # The squares of √p ∇log p, summed over labels, are the expectation over a sampled label.
            return [share.sqrt() * log for share, log in zip(logs.exp().detach(), logs, strict=True)]

        actual = fisher(model, context(row.repeat(200, 1), tmp_path))
        for name, expected in sum_squared_gradients(model, by_label).items():
            assert torch.allclose(
                actual[name].double(), expected, rtol=0.2, atol=1e-3 * expected.max().item()
            )


def test_regression_and_multi_label_models_use_the_gradients_of_their_losses(
    tiny: Tiny, tmp_path: Path
) -> None:
    row = make_tokens(1, 6)
    model = load_in_fp64(tiny("bert", "classification"))
    model.config.problem_type = "multi_label_classification"

    def by_label() -> list[Tensor]:
        logits = model.module(row).logits[0]
        share = logits.sigmoid().detach()
        return list((share * (1 - share)).sqrt() * logits)

    actual = fisher(model, context(row.repeat(400, 1), tmp_path))
    expected = sum_squared_gradients(model, by_label)
    name = "bert.encoder.layer.1.output.dense"
    assert actual[name].sum().item() == pytest.approx(expected[name].sum().item(), rel=0.2)

    model.config.problem_type = None
    model.module.classifier = nn.Linear(64, 1, dtype=torch.float64)
    model.config.num_labels = 1
    expected = sum_squared_gradients(model, lambda: [model.module(row).logits[0, 0]])
    exact = fisher(model, context(row, tmp_path))
    assert all(torch.allclose(exact[name].double(), expected[name], rtol=1e-5) for name in expected)


def test_half_the_fisher_times_the_squared_change_predicts_the_agreement_loss(
    tiny_bert: Path, tmp_path: Path
) -> None:
    tokens = make_tokens(32, 8)
    model = load_in_fp64(tiny_bert)
    information = fisher(model, context(tokens, tmp_path))

    def vectors() -> Tensor:
        with torch.no_grad():
            return model.module(tokens).last_hidden_state.mean(dim=1)

    original_vectors = vectors()
    generator = torch.Generator().manual_seed(1)
    name = "encoder.layer.1.intermediate.dense"
    weight = model.linears()[name].get_parameter("weight").data
    original_weight = weight.clone()
    losses = []
    for _ in range(20):
        weight.copy_(
            original_weight
            + 1e-3 * torch.randn(original_weight.shape, generator=generator, dtype=torch.float64)
        )
        losses.append((1 - nn.functional.cosine_similarity(vectors(), original_vectors)).mean())
    predicted = 0.5 * information[name].sum().item() * 1e-6
    assert torch.stack(losses).mean().item() == pytest.approx(predicted, rel=0.15)


def test_fisher_is_read_from_its_file_the_second_time(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = make_tokens(2, 8)
    first = fisher(
        loading.load(tiny_llama), Context(Statistics(tmp_path, "key"), tmp_path, 0, calibration=tokens)
    )
    reloaded = fisher(loading.load(tiny_llama), Context(Statistics(tmp_path, "key"), tmp_path, 0))
    assert [file.name for file in tmp_path.glob("*.0.*")] == ["key-fisher.0.safetensors"]
    assert all(torch.equal(first[name], reloaded[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


def test_a_model_without_finite_gradients_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    with pytest.raises(ValueError, match=r"data\.calibration"):
        fisher(model, Context(Statistics(None, "key"), tmp_path, 0))
    model.blocks[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite gradients"):
        fisher(model, context(make_tokens(1, 4), tmp_path))
    name = "model.layers.2.mlp.up_proj"
    weight = model.linears()[name].get_parameter("weight")
    model.replace(name, SparseLinear.of(weight, weight > 0, None))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj is a SparseLinear"):
        fisher(model, context(make_tokens(1, 4), tmp_path))


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


@pytest.mark.parametrize("family", families.names())
def test_every_family_and_task_has_fisher_information_in_bf16(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    for task in families.family(family).tasks:
        model = loading.load(tiny(family, task))
        information = fisher(model, context(make_tokens(2, 8), tmp_path))
        assert list(information) == list(model.linears())
        unreached = [name for name, squared in information.items() if squared.max() == 0]
        assert not unreached
