"""What is foretold of choices that differ by block, and what is solved from it before a search begins."""

from __future__ import annotations

import dataclasses
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

EACH = "{rtn: {bits: {choices: [2, 4, 8], each: layer}, embedding_bits: [16, 8]}}"
BLOCKS = (4.0, 1.0, 2.0, 1.0)
"""How much each of 4 blocks matters."""


def levels_of(space: Any) -> Levels:
    """2 bits do 16 times the damage of 4, and these of 8; packed embeddings a little."""
    found = {}
    for key, step in uniform_steps(space).items():
        options = step.options()
        share = {2: 1.0, 4: 1 / 16, 8: 1 / 256}[int(options["bits"])]
        found[key] = LayerSensitivity(
            tuple(share * one for one in BLOCKS), 0.5 if options["embedding_bits"] == 8 else 0.0
        )
    return Levels(found)


def choices_of(bits: tuple[int, ...], embedding_bits: int = 16) -> dict[str, Any]:
    each = {f"bits.rtn.bits.{block}": own for block, own in enumerate(bits)}
    return {"bits": "rtn", "bits.rtn.embedding_bits": embedding_bits, **each}


def known_of(ready: PreparedStudy) -> KnownMetrics:
    return KnownMetrics(ready, CostModel.of(ready))


@pytest.fixture
def study_of(study_file: Path) -> Callable[..., PreparedStudy]:
    """Prepares the tiny study with one stage alone, `bits`."""

    def made(stage: str, *overrides: str) -> PreparedStudy:
        before, after = study_file.read_text().split("space:"), "search:"
        text = f"{before[0]}space: {{bits: {stage}}}\n{after}{before[1].partition(after)[2]}"
        study_file.write_text(text)
        return prepare(load(study_file, overrides))

    return made


@pytest.fixture
def ready(study_of: Callable[..., PreparedStudy]) -> PreparedStudy:
    plain = study_of(EACH)
    return dataclasses.replace(plain, levels=levels_of(plain.space))


def test_every_level_of_every_setting_is_one_uniform_step(ready: PreparedStudy) -> None:
    told = {
        (step.options()["bits"], step.options()["embedding_bits"])
        for step in uniform_steps(ready.space).values()
    }
    assert told == {(bits, embedding) for bits in (2, 4, 8) for embedding in (16, 8)}
    assert uniform_steps(parse({"bits": {"rtn": {"bits": [2, 4]}}})[0]) == {}
    endless = {"gptq": {"bits": {"choices": [2, 4], "each": "layer"}, "damping": {"low": 0.01, "high": 0.1}}}
    assert uniform_steps(parse({"bits": endless}, depth=Depth(4, 28))[0]) == {}


def test_what_is_foretold_is_the_sum_of_what_each_block_does_alone(ready: PreparedStudy) -> None:
    assert known_of(ready)(choices_of((2, 4, 8, 4)))[PREDICTED_KL] == pytest.approx(
        4 + 1 / 16 + 2 / 256 + 1 / 16
    )
    assert known_of(ready)(choices_of((8, 8, 8, 8), 8))[PREDICTED_KL] == pytest.approx(8 / 256 + 0.5)
    assert known_of(ready)({**choices_of((2, 2, 2, 2)), "bits": "skip"})[PREDICTED_KL] == 0.0


def test_runs_of_blocks_count_for_all_their_blocks(study_of: Callable[..., PreparedStudy]) -> None:
    plain = study_of(EACH.replace("each: layer", "each: layer, groups: 2"))
    ready = dataclasses.replace(plain, levels=levels_of(plain.space))
    assert known_of(ready)(choices_of((2, 8)))[PREDICTED_KL] == pytest.approx(5 + 3 / 256)


def test_of_a_technique_that_is_the_same_for_all_blocks_nothing_is_foretold(ready: PreparedStudy) -> None:
    both = {"bits": {"rtn": {"bits": {"choices": [2, 4, 8], "each": "layer"}}, "hqq": {"bits": 4}}}
    space, _ = parse(both, depth=Depth(4, 28))
    found = levels_of(parse({"bits": {"rtn": both["bits"]["rtn"]}}, depth=Depth(4, 28))[0])
    choices = {"bits": "hqq", **{f"bits.rtn.bits.{block}": 2 for block in range(4)}}
    assert found.divergence(space, choices) is None


def test_allocations_spread_over_the_sizes_within_budgets_and_are_the_best_of_all_mixes(
    ready: PreparedStudy,
) -> None:
    assert ready.levels is not None
    known = known_of(ready)
    size = known.size_bytes
    solver = Allocations.of(ready.space, ready.levels, size)
    found = solver.spread(None, 5)
    sizes = [size(choices) for choices in found]
    assert 3 <= len(found) <= 5
    assert sizes == sorted(sizes)
    every = [
        known(choices_of((a, b, c, d), e))
        for a in (2, 4, 8) for b in (2, 4, 8) for c in (2, 4, 8) for d in (2, 4, 8) for e in (16, 8)
    ]  # fmt: skip
    for choices in found:
        told = known(choices)
        # The file's header differs by a few bytes with the bits of the blocks.
        within = [one for one in every if one["size_bytes"] < told["size_bytes"] - 64]
        assert all(one[PREDICTED_KL] > told[PREDICTED_KL] for one in within)
    assert all((size(choices) or 0) <= sizes[1] for choices in solver.spread(sizes[1], 5))
    within = solver.within(int(sizes[1]))
    assert within is not None
    assert (size(within) or 0) <= sizes[1]
    assert solver.within(1000) is None


def test_the_damage_is_measured_once_and_the_search_begins_with_what_is_solved_from_it(
    study_of: Callable[..., PreparedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ledger = study_of(EACH, "search.candidates=16"), Ledger(tmp_path / "ledger.db")
    before = initial_design(plain, known_of(plain))
    first = fit_predictors.fit_predictors(plain, ledger, InlineExecutor())
    monkeypatch.setattr(fit_predictors, "measure_layer_sensitivity", lambda *_: pytest.fail("measured again"))
    second = fit_predictors.fit_predictors(plain, ledger, InlineExecutor())
    assert first.levels == second.levels
    design = initial_design(second, known_of(second))
    assert 0 < len(design) <= 4
    assert design != before
    costs = CostModel.of(second)
    assert all(propose(second, costs, choices).refused is None for choices in design)
