"""Foretelling: has a table of operations made for a study, before its search begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.executor import Executor, Resources
from jobs import formats
from jobs.job import Failure, Job, Materials
from jobs.layout import Layout
from jobs.operations import Table
from jobs.run import failure
from jobs.table import make_table
from orchestrator.ledger import Ledger
from orchestrator.prepare import Prepared, shipped_as, table_models
from orchestrator.search.proposals import uniform

_POOL = 200
"""Models of the space from which the most telling ones are timed."""
_NOTE = "table"


def foretelling(prepared: Prepared, ledger: Ledger, executor: Executor) -> Prepared:
    """The study with its table of operations, where it wants one: what the ledger noted, or made now, on a slot
    of its own. Raises RuntimeError where the models of the table could not be timed."""
    if not prepared.plan.timed or not table_models(prepared.config):
        return prepared
    noted = ledger.noted(_NOTE)
    if noted is None:
        noted = json.dumps(dataclasses.asdict(_made(prepared, executor)))
        ledger.note(_NOTE, noted)
    return prepared.with_table(Table.from_dict(json.loads(noted)))


def sampled(prepared: Prepared, count: int, seed: int) -> list[Layout]:
    """Layouts of distinct models that the study may propose, drawn uniformly; fewer where there are not so many."""
    generator = np.random.default_rng(seed)
    form = formats.load(shipped_as(prepared.materials.target))
    found: dict[str, Layout] = {}
    for _ in range(10 * count):
        recipe = prepared.space.recipe(
            prepared.plan.original.origin, uniform(prepared.space.knobs(), generator)
        )
        try:
            layout = recipe.layout(prepared.layout)
        except ValueError:  # choices that make no model
            continue
        if form.refusal(layout) is None:
            found.setdefault(recipe.id, layout)
        if len(found) == count:
            break
    return list(found.values())


def _made(prepared: Prepared, executor: Executor) -> Table:
    # Twice the original is held: beside it runs what it is compared with.
    memory = 2 * prepared.memory_gib(Job(prepared.plan.original, (), ""))
    cache = Path(prepared.config.store).expanduser().resolve() / "cache"
    layouts = sampled(prepared, _POOL, prepared.config.search.seed)
    executor.submit(
        _NOTE, _make, prepared.materials, layouts, cache, table_models(prepared.config),
        resources=Resources(memory_gib=memory, exclusive=True),
    )  # fmt: skip
    while True:
        for ended in executor.wait(1.0):
            made = ended.value
            if isinstance(made, Failure) or made is None:
                reason = made.message if isinstance(made, Failure) else ended.lost
                raise RuntimeError(
                    f"the table of operations could not be made ({reason}); search.table=0 does without one"
                )
            return Table.from_dict(made)


def _make(materials: Materials, layouts: list[Layout], cache: Path, most: int) -> Mapping[str, Any] | Failure:
    try:
        return dataclasses.asdict(make_table(materials, layouts, cache, most))
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        return failure(error)
