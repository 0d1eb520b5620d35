"""Recipes omit steps without effect, have stable ids, and survive storage as JSON."""

from __future__ import annotations

import json

import pytest

from jobs.recipe import Origin, Recipe
from jobs.techniques.drop_layers import DropLayers
from jobs.techniques.prune_ffn import PruneFfn
from jobs.techniques.rtn import Rtn

ORIGIN = Origin("model", "data", 0)


def test_a_no_op_step_is_omitted() -> None:
    recipe = Recipe(ORIGIN).then(DropLayers(count=0)).then(PruneFfn(ratio=0)).then(Rtn(bits=4))
    assert recipe == Recipe(ORIGIN, (Rtn(bits=4),))


def test_the_lineage_leads_from_the_original_to_the_recipe() -> None:
    recipe = Recipe(ORIGIN).then(DropLayers(count=1)).then(Rtn())
    assert [len(ancestor.steps) for ancestor in recipe.lineage()] == [0, 1, 2]
    assert recipe.parent == Recipe(ORIGIN, (DropLayers(count=1),))
    assert Recipe(ORIGIN).parent is None
    assert str(Recipe(ORIGIN)) == "original"
    assert str(recipe).startswith("drop_layers(count=1) → rtn(bits=8")


def test_the_id_depends_on_every_option_the_order_and_the_origin() -> None:
    pruning, rounding = PruneFfn(ratio=0.5), Rtn(bits=4)
    recipes = [
        Recipe(ORIGIN),
        Recipe(ORIGIN, (pruning, rounding)),
        Recipe(ORIGIN, (rounding, pruning)),
        Recipe(ORIGIN, (pruning, Rtn(bits=3))),
        Recipe(Origin("model", "data", 1), (pruning, rounding)),
    ]
    assert len({recipe.id for recipe in recipes}) == len(recipes)
    assert Recipe(ORIGIN, (DropLayers(count=1),)).id == Recipe(ORIGIN, (DropLayers.of({"count": 1.0}),)).id


def test_a_recipe_is_restored_from_json() -> None:
    recipe = Recipe(ORIGIN, (PruneFfn(ratio=0.5), Rtn(bits=4)))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_of_another_version_of_a_technique_is_refused() -> None:
    record = Recipe(ORIGIN, (Rtn(),)).to_dict()
    record["steps"][0]["version"] = 99
    with pytest.raises(ValueError, match="rtn version 99"):
        Recipe.from_dict(record)
