from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jobs.compression.sparsity import Sparsity
from jobs.techniques import wanda
from jobs.techniques.sparsegpt import SparseGpt, prune


def case(seed: int, out: int = 6, into: int = 160, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """In fp64, so that no two scores are near enough to change places by rounding."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(into, into, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, into, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens


def pruned(weight: Tensor, gram: Tensor, options: SparseGpt) -> tuple[Tensor, Tensor]:
    (mended,), (kept,) = prune([weight], gram, options)
    return mended, kept


def cost(difference: Tensor, gram: Tensor) -> float:
    return (difference @ gram * difference).sum().item()


def slow(weight: Tensor, gram: Tensor, options: SparseGpt) -> tuple[Tensor, Tensor]:
    """Frantar & Alistarh, section 3: column by column, with the inverse of the Hessian of the columns that
    are left computed anew, and Optimal Brain Surgeon's update (eq. 1 and 2) for each weight that goes."""
    size = weight.shape[1]
    hessian = gram + options.damping * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(size)]
    w = weight.clone()
    keep = torch.ones_like(w, dtype=torch.bool)
    for column in range(size):
        if options.pattern == "unstructured" and column % 128 == 0:
            end = min(column + 128, size)
            errors = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(column, end)], dim=1)
            goes = int(options.sparsity * end) - int(options.sparsity * column)
            order = errors.flatten().argsort()
            chosen = torch.ones_like(order, dtype=torch.bool)
            chosen[order[: goes * len(w)]] = False
            keep[:, column:end] = chosen.view(len(w), -1)
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
    weight, gram = case(0)
    options = SparseGpt(sparsity=share, pattern=pattern)
    mended, kept = pruned(weight, gram, options)
    expected, theirs = slow(weight, gram, options)
    assert torch.equal(kept, theirs)
    assert torch.allclose(mended, expected, rtol=1e-6, atol=1e-8)
    assert not mended[~kept].any()


def test_on_correlated_inputs_it_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    weight, _ = case(1, out=32)
    generator = torch.Generator().manual_seed(1)
    # Some inputs are strong and some weak, in no order, and all have something in common.
    x = torch.randn(600, 160, generator=generator) + torch.randn(600, 1, generator=generator)
    x = x.double() * torch.linspace(0.1, 4, 160)[torch.randperm(160, generator=generator)]
    gram = x.T @ x / len(x)
    for pattern in ("unstructured", "2:4"):
        target = Sparsity(0.5, pattern)
        by_magnitude = weight * target.mask_by_linear(weight.abs())
        by_wanda = weight * target.mask_by_row(wanda.scores(weight, gram.diagonal()))
        mended, _ = pruned(weight, gram, SparseGpt(sparsity=0.5, pattern=pattern))
        errors = [cost(weight - made, gram) for made in (mended, by_wanda, by_magnitude)]
        assert errors[0] < 0.8 * errors[1]
        assert errors[1] < 0.8 * errors[2]


def test_with_inputs_that_do_not_interact_nothing_is_mended() -> None:
    weight, _ = case(2)
    mended, kept = pruned(weight, torch.eye(160, dtype=torch.float64), SparseGpt(sparsity=0.5))
    assert torch.equal(mended, weight * kept)
    for block in (slice(0, 128), slice(128, 160)):
        part, stays = weight[:, block].abs(), kept[:, block]
        assert part[stays].min() > part[~stays].max()


def test_the_error_rises_with_the_sparsity() -> None:
    weight, gram = case(3)
    errors = [
        cost(weight - pruned(weight, gram, SparseGpt(sparsity=share))[0], gram)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert errors == sorted(errors)


def test_inputs_never_seen_go_first_and_a_singular_gram_does_no_harm() -> None:
    weight, gram = case(4)
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[:, 3] = 0
    mended, kept = pruned(weight, x.T @ x, SparseGpt())
    assert torch.isfinite(mended).all()
    assert not kept[:, 3].any()
    mended, kept = pruned(weight, torch.zeros_like(gram), SparseGpt())
    assert torch.equal(kept.sum(), torch.tensor(6 * 80))


def test_linears_that_are_stacked_come_out_as_alone() -> None:
    weight, gram = case(5, out=9)
    weight[:4] *= 100  # one threshold for both would leave the second linear nothing
    parts = [weight[:4], weight[4:]]
    mended, kept = prune(parts, gram, SparseGpt(sparsity=0.6))
    for part, new, stays in zip(parts, mended, kept, strict=True):
        alone, theirs = pruned(part, gram, SparseGpt(sparsity=0.6))
        assert torch.equal(stays, theirs)
        assert torch.allclose(new, alone, rtol=1e-9, atol=1e-9)
        assert int(stays.sum()) == len(part) * 64
