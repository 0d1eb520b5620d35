"""Work: what a job leaves on the worker's disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs import run
from jobs.job import Job, Success
from jobs.recipe import Recipe
from jobs.techniques.finetune import Finetune
from orchestrator.prepare import Prepared
from orchestrator.work import Workplace, work


def test_checkpoints_are_kept_until_the_training_has_gone_well(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    ready = prepared()
    place = Workplace(ready.materials, ready.config.store, tmp_path / "scratch", tmp_path / "cache")
    root = ready.plan.original
    recipe = Recipe(root.origin, (Finetune(steps=60),))
    folder = tmp_path / "checkpoints" / recipe.id
    attempt, seen = run.attempt, []
    assert isinstance(work(Job(root, (), "materials"), place), Success)

    def watched(*given: object, **named: object) -> object:
        made = attempt(*given, **named)  # type: ignore[arg-type]
        seen.append([file.name for file in folder.iterdir()])
        return made

    try:
        run.attempt = watched  # type: ignore[assignment]
        assert isinstance(work(Job(recipe, (), "materials"), place), Success)
    finally:
        run.attempt = attempt
    (left,) = seen
    assert "checkpoint.json" in left
    assert not folder.exists()
