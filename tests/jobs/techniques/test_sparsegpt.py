"""SparseGPT: masks and updated weights equal those of the paper's algorithm, worked column by column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jobs.compression.sparsity import Sparsity
from jobs.techniques import wanda
from jobs.techniques.sparsegpt import SparseGpt, prune


def make_case(seed: int, out: int = 6, into: int = 160, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Return a weight and a Gram matrix in fp64, so that rounding cannot swap two scores."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(into, into, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, into, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens


def prune_linear(weight: Tensor, gram: Tensor, options: SparseGpt) -> tuple[Tensor, Tensor]:
    (updated,), (mask,) = prune([weight], gram, options)
    return updated, mask


def output_error(difference: Tensor, gram: Tensor) -> float:
    return (difference @ gram * difference).sum().item()


def prune_slowly(weight: Tensor, gram: Tensor, options: SparseGpt) -> tuple[Tensor, Tensor]:
    """Prune column by column (Frantar & Alistarh, section 3).

    The inverse Hessian of the remaining columns is recomputed for each column, and each removed weight is
    compensated with the update of Optimal Brain Surgeon (eq. 1 and 2).
    """
    size = weight.shape[1]
    hessian = gram + options.damping * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(size)]
    w = weight.clone()
    keep = torch.ones_like(w, dtype=torch.bool)
    for column in range(size):
        if options.pattern == "unstructured" and column % 128 == 0:
            end = min(column + 128, size)
            errors = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(column, end)], dim=1)
            removed_columns = int(options.sparsity * end) - int(options.sparsity * column)
            order = errors.flatten().argsort()
            mask = torch.ones_like(order, dtype=torch.bool)
            mask[order[: removed_columns * len(w)]] = False
            keep[:, column:end] = mask.view(len(w), -1)
        elif options.pattern != "unstructured" and column % (m := int(options.pattern[-1])) == 0:
            errors = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(column, column + m)], dim=1)
            keep[:, column : column + m] = errors.argsort(dim=1).argsort(dim=1) >= m // 2
        for row in range(len(w)):
            if not keep[row, column]:
                inverse = inverses[column]
                w[row, column:] -= w[row, column] / inverse[0, 0] * inverse[0]
                w[row, column] = 0
    return w, keep


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_it_equals_the_papers_algorithm_worked_column_by_column(pattern: str, share: float) -> None:
    weight, gram = make_case(0)
    options = SparseGpt(sparsity=share, pattern=pattern)
    updated, mask = prune_linear(weight, gram, options)
    expected, expected_mask = prune_slowly(weight, gram, options)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(updated, expected, rtol=1e-6, atol=1e-8)
    assert not updated[~mask].any()


def test_on_correlated_inputs_the_error_is_below_wandas_and_wandas_below_magnitudes() -> None:
    weight, _ = make_case(1, out=32)
    generator = torch.Generator().manual_seed(1)
    # Strong and weak inputs are shuffled, and a common term correlates all of them.
    x = torch.randn(600, 160, generator=generator) + torch.randn(600, 1, generator=generator)
    x = x.double() * torch.linspace(0.1, 4, 160)[torch.randperm(160, generator=generator)]
    gram = x.T @ x / len(x)
    for pattern in ("unstructured", "2:4"):
        target = Sparsity(0.5, pattern)
        by_magnitude = weight * target.mask_by_linear(weight.abs())
        by_wanda = weight * target.mask_by_row(wanda.scores(weight, gram.diagonal()))
        by_sparsegpt, _ = prune_linear(weight, gram, SparseGpt(sparsity=0.5, pattern=pattern))
        errors = [output_error(weight - pruned, gram) for pruned in (by_sparsegpt, by_wanda, by_magnitude)]
        assert errors[0] < 0.8 * errors[1]
        assert errors[1] < 0.8 * errors[2]


def test_with_uncorrelated_inputs_remaining_weights_do_not_change() -> None:
    weight, _ = make_case(2)
    updated, mask = prune_linear(weight, torch.eye(160, dtype=torch.float64), SparseGpt(sparsity=0.5))
    assert torch.equal(updated, weight * mask)
    for block in (slice(0, 128), slice(128, 160)):
        magnitudes, block_mask = weight[:, block].abs(), mask[:, block]
        assert magnitudes[block_mask].min() > magnitudes[~block_mask].max()


def test_the_error_rises_with_the_sparsity() -> None:
    weight, gram = make_case(3)
    errors = [
        output_error(weight - prune_linear(weight, gram, SparseGpt(sparsity=share))[0], gram)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert errors == sorted(errors)


def test_unused_inputs_are_removed_first_and_a_singular_gram_is_accepted() -> None:
    weight, gram = make_case(4)
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[:, 3] = 0
    updated, mask = prune_linear(weight, x.T @ x, SparseGpt())
    assert torch.isfinite(updated).all()
    assert not mask[:, 3].any()
    updated, mask = prune_linear(weight, torch.zeros_like(gram), SparseGpt())
    assert torch.equal(mask.sum(), torch.tensor(6 * 80))


def test_stacked_linears_are_pruned_as_if_each_were_alone() -> None:
    weight, gram = make_case(5, out=9)
    weight[:4] *= 100  # a shared threshold would remove the whole second linear
    parts = [weight[:4], weight[4:]]
    updated_parts, masks = prune(parts, gram, SparseGpt(sparsity=0.6))
    for part, updated, mask in zip(parts, updated_parts, masks, strict=True):
        expected, expected_mask = prune_linear(part, gram, SparseGpt(sparsity=0.6))
        assert torch.equal(mask, expected_mask)
        assert torch.allclose(updated, expected, rtol=1e-9, atol=1e-9)
        assert int(mask.sum()) == len(part) * 64
