"""Read a study file key by key, and report every problem with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from orchestrator.config.problems import InvalidStudyError, Problem
from orchestrator.config.schema import StudyConfig


@dataclass(frozen=True)
class Loaded:
    """A study file as far as it could be read. Keys listed in `problems` hold their defaults in `config`.

    text: the file as it stands, with the overrides as comments; places: where each key was given.
    """

    config: StudyConfig
    problems: tuple[Problem, ...]
    text: str
    places: Mapping[str, str]

    def located(self, problem: Problem) -> str:
        """The problem with its place: that of the key, or of the nearest key above it."""
        key = problem.key
        while key and key not in self.places:
            key = key.rpartition(".")[0] if "." in key else ""
        return f"{self.places[key]} {problem.key}: {problem.message}"


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a study file and `key=value` overrides.

    Raises InvalidStudy at once only where the file is no YAML mapping; all else is collected.
    """
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        given = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InvalidStudyError([f"{place} got {getattr(error, 'problem', error)}, expected YAML"]) from error
    except OmegaConfBaseException as error:
        raise InvalidStudyError([f"{path}:1 got {_first_line(error)}, expected a study"]) from error
    if not isinstance(given, dict) or root is None:
        raise InvalidStudyError(
            [f"{path}:1 got {type(given).__name__}, expected a mapping with name, model, data …"]
        )
    places = {"": f"{path}:1", **{key: f"{path}:{line}" for key, line in _lines(root)}}
    problems: list[Problem] = []
    config = OmegaConf.structured(StudyConfig)
    for key, value in _leaves(given):
        config = _merged(config, key, value, problems)
    for override in overrides:
        key, equals, _ = override.partition("=")
        for end in range(1, key.count(".") + 2):
            places.setdefault(".".join(key.split(".")[:end]), "command line")
        places[key] = "command line"
        if not equals:
            problems.append(Problem(key, f"got {override!r}, expected key=value"))
            continue
        value = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        for _ in key.split("."):
            value = next(iter(value.values())) if isinstance(value, dict) else value
        config = _merged(config, key, value, problems)
    wrong = {problem.key for problem in problems}
    for key in sorted(OmegaConf.missing_keys(config) - wrong):
        problems.append(Problem(key, "got nothing, expected a value: it must be given"))
        OmegaConf.update(config, key, "")
    shown = text + "".join(f"\n# {override}" for override in overrides)
    return Loaded(_to_object(config, problems), tuple(problems), shown, places)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InvalidStudyError([f"{path}:1 got {reason}, expected a study file in YAML"]) from error


def _merged(config: Any, key: str, value: Any, problems: list[Problem]) -> Any:
    """`config` with one more key set, or as it was and a problem more."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        try:
            return OmegaConf.merge(config, nested)
        except TypeError:  # an override that puts a range in the place of a list: nothing to merge
            OmegaConf.update(config, key, value, merge=False)
            return config
    except ConfigKeyError as error:
        wrong = str(error.full_key)
        near = re.search(r"Did you mean[^']*'([^']+)'", str(error))
        hint = f"did you mean {near[1]}?" if near else "there is none of this name here"
        problems.append(Problem(wrong, f"got {wrong.rpartition('.')[2]}, expected a known key: {hint}"))
    except OmegaConfBaseException as error:
        problems.append(Problem(key, f"got {value!r}, expected {_expected(error)}"))
    return config


def _expected(error: Exception) -> str:
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}
    converted = re.search(r"could not be converted to (\w+)", str(error))
    if converted:
        return kinds.get(converted[1], converted[1])
    if "ListConfig" in str(error):
        return "a list"
    if "Merge error" in str(error) or "Cannot assign" in str(error):
        return "a mapping of keys to values"
    return f"something else: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _to_object(config: Any, problems: list[Problem]) -> StudyConfig:
    try:
        loaded = OmegaConf.to_object(config)
    except (
        OmegaConfBaseException
    ) as error:  # an interpolation such as ${oc.env:NAME} that resolves to nothing
        key = str(getattr(error, "full_key", "") or "")
        problems.append(Problem(key, f"got {_first_line(error)}, expected a value that resolves"))
        return StudyConfig(name="", model="")
    assert isinstance(loaded, StudyConfig)
    return loaded


def _leaves(given: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key. The space is one value: its keys are checked against the techniques."""
    for name, value in given.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and value and key != "space" and not key.endswith(".where"):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _lines(node: yaml.Node, above: str = "") -> Iterator[tuple[str, int]]:
    """Every key of a YAML document with the line that it stands on, the first being 1."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{above}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _lines(value, f"{key}.")
