"""The table of real compressions that searches are compared on holds all of its space."""

from __future__ import annotations

from pathlib import Path

from benchmarks.search_problems import combinations, matter, problem
from benchmarks.sweep import QUICK, space, sweep
from jobs.materials import Materials, Target, TextSource
from jobs.recipe import Origin, Recipe


def test_every_choice_of_the_real_sweep_was_measured_and_only_its_size_is_known() -> None:
    given = problem("minilm_sweep")
    every = list(combinations(given.space))
    assert len(every) == 351
    for choices in every:
        found = given.evaluate(choices)
        assert given.known(choices) == {"size_bytes": found["size_bytes"]}
        assert found["agreement"] <= 1
    assert given.best() > 0


def test_a_sweep_measures_each_combination_once(tiny_bert: Path, text_file: Path) -> None:
    some = TextSource(str(text_file), 4, 16)
    materials = Materials(str(tiny_bert), "embedding", some, some, target=Target(threads=1))
    rows = list(sweep(Recipe(Origin("tiny", "text", 0)), materials, QUICK))
    chosen = [row.choices for row in rows]
    assert all(matter(one) == one for one in chosen)
    assert len(chosen) == len({tuple(sorted(one.items())) for one in chosen}) == 6
    assert {knob for one in chosen for knob in one} == set(space(QUICK))
    by_bits = {
        one["bits"]: row.metrics for one, row in zip(chosen, rows, strict=True) if one["width"] == "skip"
    }
    assert by_bits["rtn"]["size_bytes"] < by_bits["skip"]["size_bytes"]
