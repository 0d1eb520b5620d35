"""Latency predictions are sums over a model's operations, with costs fitted to the timings of other models."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.materials import Materials, Target
from jobs.models import loading
from jobs.models.layout import Layout, Packing
from jobs.prediction import latency_model, latency_table
from jobs.prediction.latency_model import Sample, Table, amounts, fit, most_informative, predict


@pytest.fixture
def layout(tiny_llama: Path) -> Layout:
    return loading.original_layout(tiny_llama)


def packed(layout: Layout, bits: int) -> Layout:
    return layout.packed(Packing(bits, 32, True))


def test_the_operations_of_a_model_are_counted_by_kind(layout: Layout) -> None:
    # 4 blocks of width 64: queries and outputs are 64×64, keys and values 32×64, three linears are 160×64. The
    # tied head has 512 rows.
    weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64) / 1e6
    assert amounts(layout) == pytest.approx(
        {"model": 1, "block": 4, "vectors": 4 * 2 * 64 / 1e6, "attention": 4 * 64 / 1e6, "linear dense": 28,
         "weights dense": weights, "head dense": 512 * 64 / 1e6}
    )  # fmt: skip
    counts = amounts(packed(layout, 4))
    assert counts["linear packed 4"] == 28
    assert counts["weights packed 4 group 32"] == pytest.approx(weights)


def test_a_prediction_is_the_sum_over_the_models_operations(layout: Layout) -> None:
    units = {"model": 1.0, "block": 0.5, "vectors": 0.0, "attention": 0.0, "linear dense": 0.1,
             "weights dense": 10.0, "head dense": 100.0}  # fmt: skip
    weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64) / 1e6
    expected = 1.0 + 4 * 0.5 + 28 * 0.1 + 10 * weights + 100 * 512 * 64 / 1e6
    assert predict(layout, Table({"decode_ms": units}, {})) == {"decode_ms": pytest.approx(expected)}


def test_an_operation_that_was_never_timed_is_refused(layout: Layout) -> None:
    table = fit([Sample(amounts(layout), {"decode_ms": 1.0})])
    with pytest.raises(LookupError, match="has no linear packed 4, weights packed 4 group 32"):
        predict(packed(layout, 4), table)


def test_the_fit_recovers_times_that_are_sums() -> None:
    generator = np.random.default_rng(0)
    unit_ms = {"model": 2.0, "block": 0.3, "weights dense": 0.05}
    pool = [
        {"model": 1.0, "block": float(generator.integers(4, 30)), "weights dense": float(generator.uniform(20, 100))}
        for _ in range(12)
    ]  # fmt: skip
    samples = [
        Sample(operations, {"decode_ms": latency_model.predicted_ms(operations, unit_ms)})
        for operations in pool
    ]
    table = fit(samples)
    for operations in pool:
        assert latency_model.predicted_ms(operations, table.unit_ms["decode_ms"]) == pytest.approx(
            latency_model.predicted_ms(operations, unit_ms), rel=0.01
        )
    assert table.errors["decode_ms"] < 0.02


def test_no_fitted_time_is_negative() -> None:
    rows = [({"a": 1.0, "b": 1.0}, 1.0), ({"a": 2.0, "b": 1.0}, 0.5), ({"a": 3.0, "b": 1.0}, 0.2)]
    table = fit([Sample(operations, {"decode_ms": ms}) for operations, ms in rows])
    assert min(table.unit_ms["decode_ms"].values()) >= 0


def test_the_most_informative_models_are_those_that_differ() -> None:
    pool = [{"a": 1.0, "b": 1.0}, {"a": 1.01, "b": 1.0}, {"a": 0.1, "b": 1.0}, {"a": 1.0, "c": 1.0}]
    assert set(most_informative(pool, [], 3)) == {1, 2, 3}
    assert most_informative(pool, [{"a": 1.0, "c": 1.0}], 2)[0] in (1, 2)
    assert most_informative(pool, [], 9).__len__() == 4


@pytest.mark.slow
def test_a_latency_table_is_fitted_to_timed_models_and_stored(
    tiny_llama: Path, tmp_path: Path, layout: Layout
) -> None:
    materials = Materials(str(tiny_llama), "causal-lm", target=Target(prompt_tokens=8, new_tokens=4))
    pool = [packed(layout, bits) for bits in (4, 8)]
    table = latency_table.make_table(materials, pool, tmp_path, max_timings=2)
    assert set(table.unit_ms) == {"prefill_ms", "decode_ms"}
    for timed_layout in (layout, *pool):
        assert predict(timed_layout, table)["decode_ms"] > 0
    (file,) = (tmp_path / "tables").iterdir()
    stored_text = file.read_text()
    assert latency_table.make_table(materials, pool, tmp_path, max_timings=0) == Table(
        **dataclasses.asdict(table)
    )
    assert file.read_text() == stored_text
