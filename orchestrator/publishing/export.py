"""Export: a member of the front as a folder to ship, complete or absent, with all that is known of it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import open_store
from jobs import formats, runtimes
from jobs.materials import Materials, materials_from_dict
from jobs.models import loading
from jobs.recipe import Recipe
from orchestrator.pareto.front import PICKS, Objective, ParetoFront
from orchestrator.persistence.atomic_files import write_json
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.records import ArtifactRecords
from orchestrator.persistence.study_folder import MEASUREMENT, RECIPE, SCRATCH, StudyFolder
from orchestrator.publishing.model_card import model_card
from orchestrator.study.events import CandidateProposed
from orchestrator.worker.work import WorkerContext, rebuild_artifact

_ANOTHER_COPY = """
The files that were measured had been removed; these were made again by the same recipe and differ from them in their
last bits. `slimfront verify` measures these.
"""


def export_member(study: Path, pick: str, out: Path, format: str | None = None) -> dict[str, Any]:
    """Write the model of the picked member, and beside it a model card, its recipe, its measurement and checksums;
    returns the member. A model that was removed from the store is made again first, which takes as long as it took.

    study: the study's folder, whose parent is the store, unless it names another. pick: a name such as knee, or the
    start of an id. format: the form that the study's target runs, unless another is given. Raises LookupError where
    nothing is picked, FileExistsError where `out` holds something, ValueError where the format cannot hold the model.
    """
    files = StudyFolder(study)
    file = files.front
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: {study} holds no study, or nothing of it has ended yet"
        )
    found = json.loads(file.read_text())
    studied = json.loads(files.materials.read_text())
    materials = materials_from_dict(studied)
    format = format or runtimes.load(materials.target.runtime).FORMAT
    formats.load(format)  # refused before anything is fetched
    member = _picked(found, pick)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        held, made = Path(scratch) / "held", Path(scratch) / "made"
        ref = _artifact(files, member["id"], materials, Path(scratch))
        open_store(files.store()).fetch(ref, held)
        formats.write(format, held, made, files.cache)
        about = loading.read_provenance(held)
        write_json(made / RECIPE, {"id": member["id"], "text": member["recipe"], **about["recipe"]})
        measurement = {name: member[name] for name in ("metrics", "errors", "environment")}
        known = {"original": found["original"], "materials": studied}
        write_json(made / MEASUREMENT, {**measurement, **known})
        steps = [step["technique"] for step in about["recipe"]["steps"]]
        card = model_card(format, member, found["original"], materials, steps)
        (made / "README.md").write_text(card if ref.digest == member["artifact"] else card + _ANOTHER_COPY)
        mark = json.loads((made / formats.EXPORT_MANIFEST).read_text())
        write_json(made / formats.EXPORT_MANIFEST, {**mark, "checksums": formats.checksums(made)})
        if out.exists():
            out.rmdir()
        os.replace(made, out)
    return member


def _artifact(study: StudyFolder, id: str, materials: Materials, scratch: Path) -> ArtifactRef:
    """The artifact of this member, made again where it was removed from the store."""
    store = open_store(study.store())
    ref = ArtifactRecords(store).named(id)
    if ref is not None and store.has(ref):
        return ref
    place = WorkerContext(materials, study.store(), scratch / SCRATCH, study.cache)
    return rebuild_artifact(_recipe(study, id), place)


def _recipe(study: StudyFolder, id: str) -> Recipe:
    if not study.ledger.is_file():
        raise LookupError(f"the model of {id} was removed, and without {study.ledger} it can't be made again")
    ledger = Ledger(study.ledger, read_only=True)
    try:
        proposed = (event.recipe for _, event in ledger.events() if isinstance(event, CandidateProposed))
        recipe = next((step for one in proposed for step in one.lineage() if step.id == id), None)
    finally:
        ledger.close()
    if recipe is None:
        raise LookupError(
            f"the model of {id} was removed, and the ledger of {study} does not know its recipe"
        )
    return recipe


def _picked(found: dict[str, Any], pick: str) -> dict[str, Any]:
    members = {member["id"]: member for member in found["members"]}
    matching = [member for id, member in members.items() if id.startswith(pick)]
    if len(matching) == 1:
        return dict(matching[0])
    if len(matching) > 1:
        raise LookupError(f"{len(matching)} members' ids start with {pick}; give more of it")
    objectives = [Objective(o["metric"], o["goal"], o["limit"]) for o in found["objectives"]]
    front = ParetoFront(objectives, {id: member["metrics"] for id, member in members.items()})
    if pick not in PICKS:
        raise LookupError(
            f"no member is called {pick!r}; give one of {', '.join(PICKS)} or the start of an id"
        )
    return dict(members[front.pick(pick)])
