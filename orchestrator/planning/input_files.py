"""List the input files that a study names, and fetch those that are in its store."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.inputs import FOLDER, SCHEME, fetch_input
from orchestrator.planning.problem_list import ProblemList


def paths(config: StudyConfig) -> dict[str, str]:
    """The files and folders that a study names, by their keys. A model's hub id and `package:NAME` are among them."""
    data = config.data
    by_key = {
        "model": config.model,
        "data.evaluation.path": data.evaluation and data.evaluation.path,
        "data.calibration.path": data.calibration and data.calibration.path,
        "data.train.path": data.train and data.train.path,
        "data.choices": data.choices,
        "data.labelled": data.labelled,
        "data.tasks.folder": data.tasks and data.tasks.folder,
    }
    return {key: path for key, path in by_key.items() if path}


def fetch_inputs(config: StudyConfig, home: Path, problems: ProblemList) -> StudyConfig:
    """The study with local paths in place of the addresses of stored inputs, which are fetched.

    home: the folder of all studies on this machine.
    """
    addresses = {key: path for key, path in paths(config).items() if path.startswith(SCHEME)}
    if not addresses:
        return config
    local = copy.deepcopy(config)
    for key, address in addresses.items():
        fetch = partial(fetch_input, address, config.store, home.resolve() / FOLDER)
        path = problems.attempt(key, fetch, "an input that slimfront submit put into the store")
        if path is not None:
            _set(local, key, str(path))
    return local


def _set(config: StudyConfig, key: str, value: str) -> None:
    *sections, name = key.split(".")
    section: object = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
