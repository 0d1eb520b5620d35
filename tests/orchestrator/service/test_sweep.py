"""Tests of the table of real compressions on which searches are compared: it covers its whole space."""

from __future__ import annotations

from pathlib import Path

from benchmarks.search_problems import combinations, matter, problem
from benchmarks.sweep import QUICK, space, sweep
from jobs.materials import Materials, Target, TextSource
from jobs.recipe import Origin, Recipe


def test_the_real_sweep_covers_every_choice_and_only_sizes_are_known_in_advance() -> None:
    sweep_problem = problem("minilm_sweep")
    all_choices = list(combinations(sweep_problem.space))
    assert len(all_choices) == 351
    for choices in all_choices:
        metrics = sweep_problem.evaluate(choices)
        assert sweep_problem.known(choices) == {"size_bytes": metrics["size_bytes"]}
        assert metrics["agreement"] <= 1
    assert sweep_problem.best() > 0


def test_a_sweep_measures_each_combination_once(tiny_bert: Path, text_file: Path) -> None:
    text = TextSource(str(text_file), 4, 16)
    materials = Materials(str(tiny_bert), "embedding", text, text, target=Target(threads=1))
    rows = list(sweep(Recipe(Origin("tiny", "text", 0)), materials, QUICK))
    measured = [row.choices for row in rows]
    assert all(matter(choices) == choices for choices in measured)
    assert len(measured) == len({tuple(sorted(choices.items())) for choices in measured}) == 6
    assert {knob for choices in measured for knob in choices} == set(space(QUICK))
    by_bits = {
        choices["bits"]: row.metrics
        for choices, row in zip(measured, rows, strict=True)
        if choices["width"] == "skip"
    }
    assert by_bits["rtn"]["size_bytes"] < by_bits["skip"]["size_bytes"]
