"""Options that a study searches block by block: their knobs, their recipes and the refusals of `validate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.knobs import Choice
from jobs.recipe import Origin
from orchestrator.planning.parse_space import Depth, parse
from orchestrator.planning.prepared_study import _digested_text
from orchestrator.search.encoding import SpaceEncoder
from orchestrator.search.proposals import uniform

ORIGIN = Origin("model", "data", 0)
PER_LAYER = {"choices": [2, 4, 8], "each": "layer"}


def space_of(options: Any, technique: str = "rtn", blocks: int = 4) -> Any:
    space, problems = parse({"bits": {technique: options}}, depth=Depth(blocks, 7 * blocks))
    assert not problems
    return space


def test_each_layer_creates_a_knob_per_block_and_groups_one_per_group() -> None:
    block_knobs = {f"bits.rtn.bits.{block}": Choice((2, 4, 8)) for block in range(4)}
    assert space_of({"bits": PER_LAYER}).knobs() == {"bits": Choice(("skip", "rtn")), **block_knobs}
    assert len(space_of({"bits": {**PER_LAYER, "groups": 2}}).knobs()) == 1 + 2
    assert len(space_of({"bits": {**PER_LAYER, "each": "linear"}}).knobs()) == 1 + 28
    assert space_of({"bits": PER_LAYER}).size() == 1 + 3**4
    ranks = space_of({"correction_rank": {"low": 0, "high": 8, "each": "layer"}})
    assert ranks.knobs()["bits.rtn.correction_rank.0"].integer


def test_the_digest_contains_the_knobs_of_blocks_in_the_spelling_of_stored_studies() -> None:
    (option,) = space_of({"bits": PER_LAYER}).stages["bits"]
    assert _digested_text(option.per_part) == (
        "{'bits': Spread(domain=Choice(values=(2, 4, 8)), runs=4, by_linear=False, grouped=False)}"
    )


def test_values_of_blocks_become_one_option_and_equal_values_the_uniform_recipe() -> None:
    space, fixed = space_of({"bits": PER_LAYER}), space_of({"bits": [2, 4, 8]})
    names = [f"bits.rtn.bits.{block}" for block in range(4)]
    mixed = space.recipe(ORIGIN, {"bits": "rtn", **dict(zip(names, (8, 4, 2, 2), strict=True))})
    assert mixed.steps[0].options()["bits"] == "8 4 2 2"
    equal = space.recipe(ORIGIN, {"bits": "rtn", **dict.fromkeys(names, 4)})
    assert equal.id == fixed.recipe(ORIGIN, {"bits": "rtn", "bits.rtn.bits": 4}).id


def test_knobs_of_blocks_have_no_effect_if_their_technique_is_skipped() -> None:
    knobs = space_of({"bits": PER_LAYER}).knobs()
    encoder = SpaceEncoder(knobs)
    drawn = uniform(knobs, np.random.default_rng(0))
    skipped, skipped_changed = (
        encoder.point({**drawn, "bits": "skip", "bits.rtn.bits.3": bits}) for bits in (2, 8)
    )
    assert (skipped == skipped_changed).all()
    used, changed = (encoder.point({**drawn, "bits": "rtn", "bits.rtn.bits.3": bits}) for bits in (2, 8))
    assert (used != changed).any()


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ({"group": {"choices": [32], "each": "layer"}}, "group", "only bits and correction_rank may differ"),
        ({"bits": {"choices": [2, 4], "each": "head"}}, "bits", "expected each: layer or each: linear"),
        ({"bits": {**PER_LAYER, "groups": 5}}, "bits", "expected a whole number from 1 to 4"),
        (
            {"bits": {"choices": [2, 5], "each": "layer"}},
            "bits",
            r"got 5, expected a value in \{2, 3, 4, 8\}",
        ),
        ({"bits": {"choices": 4, "each": "layer"}}, "bits", "expected a list"),
        (
            {"bits": {**PER_LAYER, "each": "linear", "groups": 29}},
            "bits",
            "expected a whole number from 1 to 28",
        ),
        ({"bits": {"each": "layer"}}, "bits", "got a range, expected"),
    ],
)
def test_an_option_that_cannot_differ_by_block_is_refused(value: Any, key: str, message: str) -> None:
    _, problems = parse({"bits": {"rtn": value}}, depth=Depth(4, 28))
    assert [problem.key for problem in problems] == [f"space.bits.rtn.{key}"]
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0].message)


def test_a_technique_without_options_per_block_is_refused_by_name() -> None:
    _, problems = parse(
        {"bits": {"mixed": {"average_bits": {"low": 3, "high": 4, "each": "layer"}}}}, depth=Depth(4, 28)
    )
    assert "no option of mixed may differ by layer" in problems[0].message


def test_a_knob_per_block_cannot_follow_a_removal_of_blocks_but_a_knob_per_group_can() -> None:
    depth = {"drop_layers": {"count": [0, 1]}}
    _, problems = parse({"depth": depth, "bits": {"rtn": {"bits": PER_LAYER}}}, depth=Depth(4, 28))
    assert [problem.key for problem in problems] == ["space.bits.rtn.bits"]
    assert "each after drop_layers" in problems[0].message
    assert not parse(
        {"depth": depth, "bits": {"rtn": {"bits": {**PER_LAYER, "groups": 2}}}}, depth=Depth(4, 28)
    )[1]
    assert not parse({"bits": {"rtn": {"bits": PER_LAYER}}, "depth": depth}, depth=Depth(4, 28))[1]
    space, _ = parse(
        {"depth": depth, "bits": {"rtn": {"bits": PER_LAYER}}}, any_order=True, depth=Depth(4, 28)
    )
    assert space.orders == (("bits", "depth"),)
