from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.models.bit_packing import pack, unpack
from jobs.models.layers import (
    LowRankLinear,
    PackedLinear,
    SparseLinear,
    check_finite,
    linear_of,
    spec_of,
)
from jobs.models.layout import LinearSpec, Packing


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_packed_integers_are_unpacked_unchanged(bits: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.shape == (rows, Packing(bits, 0, True).row_bytes(columns))
    assert torch.equal(unpack(packed, bits, columns).long(), values)


def test_eight_values_of_three_bits_fill_three_bytes_little_end_first() -> None:
    # 1 + 2·8 + 3·64 + 4·512 + … as one number of 24 bits
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    number = sum(value << (3 * index) for index, value in enumerate(values[0].tolist()))
    assert pack(values, 3)[0].tolist() == list(number.to_bytes(3, "little"))


def test_a_packed_linear_computes_with_scale_times_integer_minus_zero() -> None:
    packing = Packing(4, 2, symmetric=False)
    layer = PackedLinear.of(
        torch.tensor([[0, 15, 3]]), torch.tensor([[0.5, 2.0]]), torch.tensor([[5, 1]]), packing, None
    )
    assert layer.weight().tolist() == [[-2.5, 5.0, 4.0]]
    assert layer(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[6.5]]
    assert layer.dense(torch.float32)(torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [[1.5]]


def test_a_symmetric_packing_is_centred_on_the_middle_integer() -> None:
    layer = PackedLinear.of(
        torch.tensor([[0, 2, 3]]),
        torch.tensor([[1.0]]),
        None,
        Packing(2, 0, symmetric=True),
        torch.tensor([1.0]),
    )
    assert layer.weight().tolist() == [[-2.0, 0.0, 1.0]]
    assert layer(torch.zeros(1, 3)).tolist() == [[1.0]]


def test_a_low_rank_linear_is_two_linears_in_a_row() -> None:
    v, u = torch.randn(2, 5), torch.randn(3, 2)
    x = torch.randn(4, 5)
    output = LowRankLinear(linear_of(v, None), linear_of(u, torch.ones(3)))(x)
    assert torch.allclose(output, x @ v.T @ u.T + 1, atol=1e-5)


@given(rows=st.integers(1, 5), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_sparse_linear_computes_the_same_as_a_masked_dense_one(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    mask = torch.rand(rows, columns, generator=generator) < 0.4
    bias = torch.randn(rows, generator=generator).bfloat16()
    x = torch.randn(3, columns, generator=generator).bfloat16()
    layer = SparseLinear.of(weight, mask, bias)
    masked = linear_of(weight * mask, bias)
    assert torch.equal(layer(x), masked(x))
    assert torch.equal(layer.dense(torch.bfloat16)(x), masked(x))
    assert torch.equal(layer.kept(), mask)
    assert layer.spec == LinearSpec(rows, columns, True, kept=int(mask.sum()))
    assert layer.values.tolist() == weight[mask].tolist()


def test_the_spec_of_a_linear_describes_how_it_is_stored() -> None:
    assert spec_of(linear_of(torch.zeros(2, 3), None)) == LinearSpec(2, 3, bias=False)
    assert spec_of(torch.nn.LayerNorm(3)) is None
    with pytest.raises(ValueError, match="needs a spec with a packing"):
        PackedLinear(LinearSpec(2, 3, False))


def test_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match=r"rtn needs finite weights: model\.q"):
        check_finite(torch.tensor([1.0, float("inf")]), "rtn", "model.q")
