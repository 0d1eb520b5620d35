"""Fetch the input files that a study names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.inputs import FOLDER, SCHEME, fetch_input


def paths(config: StudyConfig) -> dict[str, str]:
    """The files and folders that a study names, by its keys, a model's hub id and `package:NAME` among them."""
    data = config.data
    given = {
        "model": config.model,
        "data.evaluation.path": data.evaluation and data.evaluation.path,
        "data.calibration.path": data.calibration and data.calibration.path,
        "data.train.path": data.train and data.train.path,
        "data.choices": data.choices,
        "data.labelled": data.labelled,
        "data.tasks.folder": data.tasks and data.tasks.folder,
    }
    return {key: path for key, path in given.items() if path}


def fetched(
    config: StudyConfig, home: Path, attempt: Callable[[str, Callable[[], Path], str], Path | None]
) -> StudyConfig:
    """The study with the paths that its stored inputs have here, once they are fetched. home: of all studies here.
    attempt: does what is given for a key, or notes what is wrong."""
    found = {key: path for key, path in paths(config).items() if path.startswith(SCHEME)}
    if not found:
        return config
    there = copy.deepcopy(config)
    for key, address in found.items():

        def fetch(address: str = address) -> Path:
            return fetch_input(address, config.store, home.resolve() / FOLDER)

        place = attempt(key, fetch, "what slimfront submit put into the store")
        if place is not None:
            *above, last = key.split(".")
            held: object = there
            for part in above:
                held = getattr(held, part)
            setattr(held, last, str(place))
    return there
