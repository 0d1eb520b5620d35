"""Predicted divergence of choices that differ by block, and the initial design that is solved from it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.executors.inline import InlineExecutor
from jobs.prediction.layer_sensitivity import LayerSensitivity
from orchestrator.config.load import load
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.candidates import KnownMetrics, propose
from orchestrator.planning.cost import CostModel
from orchestrator.planning.initial_design import initial_design
from orchestrator.planning.layer_sensitivity import PREDICTED_KL, Allocations, Levels, uniform_steps
from orchestrator.planning.parse_space import Depth, parse
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service import fit_predictors

PER_LAYER = "{rtn: {bits: {choices: [2, 4, 8], each: layer}, embedding_bits: [16, 8]}}"
BLOCKS = (4.0, 1.0, 2.0, 1.0)
"""The sensitivity of each of 4 blocks."""


def levels_of(space: Any) -> Levels:
    """Return sensitivities: each halving of the bits multiplies the loss by 16; packed embeddings add a little."""
    sensitivities = {}
    for key, step in uniform_steps(space).items():
        options = step.options()
        share = {2: 1.0, 4: 1 / 16, 8: 1 / 256}[int(options["bits"])]
        block_losses = tuple(share * block for block in BLOCKS)
        embedding_loss = 0.5 if options["embedding_bits"] == 8 else 0.0
        sensitivities[key] = LayerSensitivity(block_losses, embedding_loss)
    return Levels(sensitivities)


def choices_of(bits: tuple[int, ...], embedding_bits: int = 16) -> dict[str, Any]:
    bits_per_block = {f"bits.rtn.bits.{block}": block_bits for block, block_bits in enumerate(bits)}
    return {"bits": "rtn", "bits.rtn.embedding_bits": embedding_bits, **bits_per_block}


def known_metrics_of(ready: PreparedStudy) -> KnownMetrics:
    return KnownMetrics(ready, CostModel.of(ready))


@pytest.fixture
def study_of(study_file: Path) -> Callable[..., PreparedStudy]:
    """Prepares the tiny study with `bits` as its only stage."""

    def prepare_with_stage(stage: str, *overrides: str) -> PreparedStudy:
        header, _, sections = study_file.read_text().partition("space:")
        search_section = sections.partition("search:")[2]
        text = f"{header}space: {{bits: {stage}}}\nsearch:{search_section}"
        study_file.write_text(text)
        return prepare(load(study_file, overrides))

    return prepare_with_stage


@pytest.fixture
def ready(study_of: Callable[..., PreparedStudy]) -> PreparedStudy:
    unmeasured = study_of(PER_LAYER)
    return dataclasses.replace(unmeasured, levels=levels_of(unmeasured.space))


def test_every_level_of_every_setting_is_a_uniform_step(ready: PreparedStudy) -> None:
    settings = {
        (step.options()["bits"], step.options()["embedding_bits"])
        for step in uniform_steps(ready.space).values()
    }
    assert settings == {(bits, embedding) for bits in (2, 4, 8) for embedding in (16, 8)}
    assert uniform_steps(parse({"bits": {"rtn": {"bits": [2, 4]}}})[0]) == {}
    endless = {"gptq": {"bits": {"choices": [2, 4], "each": "layer"}, "damping": {"low": 0.01, "high": 0.1}}}
    assert uniform_steps(parse({"bits": endless}, depth=Depth(4, 28))[0]) == {}


def test_the_predicted_divergence_is_the_sum_over_blocks(ready: PreparedStudy) -> None:
    assert known_metrics_of(ready)(choices_of((2, 4, 8, 4)))[PREDICTED_KL] == pytest.approx(
        4 + 1 / 16 + 2 / 256 + 1 / 16
    )
    assert known_metrics_of(ready)(choices_of((8, 8, 8, 8), 8))[PREDICTED_KL] == pytest.approx(8 / 256 + 0.5)
    assert known_metrics_of(ready)({**choices_of((2, 2, 2, 2)), "bits": "skip"})[PREDICTED_KL] == 0.0


def test_groups_of_blocks_count_for_all_their_blocks(study_of: Callable[..., PreparedStudy]) -> None:
    unmeasured = study_of(PER_LAYER.replace("each: layer", "each: layer, groups: 2"))
    ready = dataclasses.replace(unmeasured, levels=levels_of(unmeasured.space))
    assert known_metrics_of(ready)(choices_of((2, 8)))[PREDICTED_KL] == pytest.approx(5 + 3 / 256)


def test_a_technique_without_options_per_block_has_no_predicted_divergence(ready: PreparedStudy) -> None:
    two_techniques = {"bits": {"rtn": {"bits": {"choices": [2, 4, 8], "each": "layer"}}, "hqq": {"bits": 4}}}
    space, _ = parse(two_techniques, depth=Depth(4, 28))
    levels = levels_of(parse({"bits": {"rtn": two_techniques["bits"]["rtn"]}}, depth=Depth(4, 28))[0])
    choices = {"bits": "hqq", **{f"bits.rtn.bits.{block}": 2 for block in range(4)}}
    assert levels.divergence(space, choices) is None


def test_allocations_cover_the_sizes_within_budgets_and_are_optimal(
    ready: PreparedStudy,
) -> None:
    assert ready.levels is not None
    known_metrics = known_metrics_of(ready)
    size = known_metrics.size_bytes
    solver = Allocations.of(ready.space, ready.levels, size)
    allocations = solver.spread(None, 5)
    sizes = [size(choices) for choices in allocations]
    assert 3 <= len(allocations) <= 5
    assert sizes == sorted(sizes)
    all_metrics = []
    for *bits, embedding_bits in itertools.product(*[(2, 4, 8)] * 4, (16, 8)):
        all_metrics.append(known_metrics(choices_of(tuple(bits), embedding_bits)))
    for choices in allocations:
        metrics = known_metrics(choices)
        # The size of the file's header differs by a few bytes with the bits of the blocks.
        smaller = [mix for mix in all_metrics if mix["size_bytes"] < metrics["size_bytes"] - 64]
        assert all(mix[PREDICTED_KL] > metrics[PREDICTED_KL] for mix in smaller)
    assert all((size(choices) or 0) <= sizes[1] for choices in solver.spread(sizes[1], 5))
    within = solver.within(int(sizes[1]))
    assert within is not None
    assert (size(within) or 0) <= sizes[1]
    assert solver.within(1000) is None


def test_the_sensitivity_is_measured_once_and_determines_the_initial_design(
    study_of: Callable[..., PreparedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmeasured, ledger = study_of(PER_LAYER, "search.candidates=16"), Ledger(tmp_path / "ledger.db")
    initial = initial_design(unmeasured, known_metrics_of(unmeasured))
    first = fit_predictors.fit_predictors(unmeasured, ledger, InlineExecutor())
    monkeypatch.setattr(fit_predictors, "measure_layer_sensitivity", lambda *_: pytest.fail("measured again"))
    second = fit_predictors.fit_predictors(unmeasured, ledger, InlineExecutor())
    assert first.levels == second.levels
    design = initial_design(second, known_metrics_of(second))
    assert 0 < len(design) <= 4
    assert design != initial
    costs = CostModel.of(second)
    assert all(propose(second, costs, choices).refused is None for choices in design)
