"""Export: a member of the front as a folder to ship, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.store import ArtifactRef, open_store
from orchestrator.front import PICKS, Objective, ParetoFront


def export_member(study: Path, pick: str, out: Path) -> dict[str, Any]:
    """Copy the model of the picked member, and beside it `recipe.json` and `measurement.json`; returns the member.

    study: the study's folder, whose parent is the store. pick: a name such as knee, or the start of an id.
    `jobs.models.load(out)` reads it back. Raises LookupError where nothing is picked, FileExistsError
    where `out` holds something.
    """
    file = study / "front.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: {study} holds no study, or nothing of it has ended yet"
        )
    found = json.loads(file.read_text())
    member = _picked(found, pick)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give a new folder")
    store = open_store(str(study.parent))
    record = store.record(f"artifacts/{member['id']}")
    if record is None:
        raise LookupError(f"the model of {member['id']} is no longer in the store {study.parent}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        held, made = Path(scratch) / "held", Path(scratch) / "made"
        store.fetch(ArtifactRef(**record), held)
        # The store's files may be shared links: what leaves the store is a copy of its own.
        shutil.copytree(held, made, copy_function=shutil.copyfile)
        about = json.loads((made / "slimfront.json").read_text())
        _write(made / "recipe.json", {"id": member["id"], "text": member["recipe"], **about["recipe"]})
        measurement = {name: member[name] for name in ("metrics", "errors")}
        _write(made / "measurement.json", {**measurement, "original": found["original"]})
        if out.exists():
            out.rmdir()
        os.replace(made, out)
    return member


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


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False))
