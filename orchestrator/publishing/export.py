"""Export a member of the front as a folder with its model, model card, recipe, measurement and checksums."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import open_store
from jobs import formats, runtimes
from jobs.materials import Materials, materials_from_dict
from jobs.models import loading
from jobs.recipe import Recipe
from orchestrator.pareto.front import PICKS, ParetoFront
from orchestrator.persistence.atomic_files import write_json
from orchestrator.persistence.front_file import read_front
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.records import ArtifactRecords
from orchestrator.persistence.study_folder import MEASUREMENT, RECIPE, SCRATCH, StudyFolder
from orchestrator.publishing.model_card import model_card
from orchestrator.study.events import CandidateProposed
from orchestrator.study.front_snapshot import FrontMember, FrontSnapshot
from orchestrator.worker.work import WorkerContext, rebuild_artifact

_ANOTHER_COPY = """
The measured files had been removed from the store; these were made again by the same recipe and differ from them by
rounding errors. `slimfront verify` measures these.
"""


def export_member(study: Path, pick: str, out: Path, format: str | None = None) -> FrontMember:
    """Write a member of the study's front into the folder `out`, which appears complete or not at all.

    A model that was removed from the store is made again first, which takes as long as its jobs took.

    study: the study's folder. pick: a name such as knee, or the start of an id. format: the default is the format of
    the study's target runtime. Raises LookupError if no member matches, FileExistsError if `out` is not empty,
    ValueError if the format cannot store the model.
    """
    files = StudyFolder(study)
    front = read_front(files.front)
    studied = json.loads(files.materials.read_text())
    materials = materials_from_dict(studied)
    format = format or runtimes.load(materials.target.runtime).FORMAT
    formats.load(format)  # refuse an unknown format before the model is fetched
    member = _find_member(front, pick)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        artifact, draft = Path(scratch) / "artifact", Path(scratch) / "export"
        ref = _artifact(files, member.id, materials, Path(scratch))
        open_store(files.store()).fetch(ref, artifact)
        formats.write(format, artifact, draft, files.cache)
        about = loading.read_provenance(artifact)
        write_json(draft / RECIPE, {"id": member.id, "text": member.recipe, **about["recipe"]})
        compared = {"original": front.original.to_dict(), "materials": studied}
        write_json(draft / MEASUREMENT, {**member.measured.to_dict(), **compared})
        steps = [step["technique"] for step in about["recipe"]["steps"]]
        card = model_card(format, member, front.original, materials, steps)
        if ref.digest != member.artifact:
            card += _ANOTHER_COPY
        (draft / "README.md").write_text(card)
        manifest = json.loads((draft / formats.EXPORT_MANIFEST).read_text())
        write_json(draft / formats.EXPORT_MANIFEST, {**manifest, "checksums": formats.checksums(draft)})
        if out.exists():
            out.rmdir()
        os.replace(draft, out)
    return member


def _artifact(study: StudyFolder, id: str, materials: Materials, scratch: Path) -> ArtifactRef:
    """Return the artifact of this member; make it again if it was removed from the store."""
    store = open_store(study.store())
    ref = ArtifactRecords(store).named(id)
    if ref is not None and store.has(ref):
        return ref
    worker = WorkerContext(materials, study.store(), scratch / SCRATCH, study.cache)
    return rebuild_artifact(_recipe(study, id), worker)


def _recipe(study: StudyFolder, id: str) -> Recipe:
    if not study.ledger.is_file():
        raise LookupError(f"the model of {id} was removed, and without {study.ledger} it can't be made again")
    ledger = Ledger(study.ledger, read_only=True)
    try:
        for _, event in ledger.events():
            if isinstance(event, CandidateProposed):
                for recipe in event.recipe.lineage():
                    if recipe.id == id:
                        return recipe
    finally:
        ledger.close()
    raise LookupError(f"the model of {id} was removed, and the ledger of {study} has no recipe of this id")


def _find_member(front: FrontSnapshot, pick: str) -> FrontMember:
    matching = [member for member in front.members if member.id.startswith(pick)]
    if len(matching) == 1:
        return matching[0]
    if len(matching) > 1:
        raise LookupError(f"the ids of {len(matching)} members start with {pick}; give more characters")
    if pick not in PICKS:
        raise LookupError(
            f"no member is called {pick!r}; give one of {', '.join(PICKS)} or the start of an id"
        )
    members = {member.id: member for member in front.members}
    metrics = {id: member.measured.metrics for id, member in members.items()}
    return members[ParetoFront(front.objectives, metrics).pick(pick)]
