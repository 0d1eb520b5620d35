"""Read a study file key by key, and report every problem with its line. The only module that parses with OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from orchestrator.config.problems import InvalidStudyError, Problem
from orchestrator.config.schema import StudyConfig
from orchestrator.config.text_checks import read_text, value_problems


@dataclass(frozen=True)
class Loaded:
    """A study file as far as it is readable."""

    config: StudyConfig
    """Keys that have a problem hold their defaults."""
    problems: tuple[Problem, ...]
    text: str
    """The text of the file, with the overrides as comments."""
    locations: Mapping[str, str]
    """The file and line, or `command line`, at which each key was set."""

    def located(self, problem: Problem) -> str:
        """The problem as a line, with the location of its key or of the nearest key above that was set."""
        key = problem.key
        while key and key not in self.locations:
            key = key.rpartition(".")[0]
        return f"{self.locations[key]} {problem.key}: {problem.message}"


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a study file and overrides of the form `key=value`.

    Raises InvalidStudyError at once if the file is no YAML mapping; all other problems are collected.
    """
    text = read_text(path)
    root, content = _parsed(path, text)
    locations = {"": f"{path}:1"}
    for key, number in _lines(root):
        locations[key] = f"{path}:{number}"
    problems: list[Problem] = []
    config = OmegaConf.structured(StudyConfig)
    for key, value in _leaves(content):
        problems += value_problems(key, value)
    config = _merged_content(config, content, problems)
    for override in overrides:
        config = _overridden(config, override, locations, problems)
    if not _resolves(config, problems):
        unreadable = Loaded(StudyConfig(name="", model=""), tuple(problems), text, locations)
        raise InvalidStudyError([unreadable.located(problem) for problem in problems])
    wrong = {problem.key for problem in problems}
    for key in sorted(OmegaConf.missing_keys(config) - wrong):
        problems.append(Problem(key, "got nothing, expected a value: this key is required"))
        OmegaConf.update(config, key, "")
    commented = text + "".join(f"\n# {override}" for override in overrides)
    return Loaded(_to_object(config, problems), tuple(problems), commented, locations)


def _parsed(path: Path, text: str) -> tuple[yaml.Node, Mapping[Any, Any]]:
    """The YAML document as nodes, which know their lines, and as plain data."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InvalidStudyError(
            [f"{location} got {getattr(error, 'problem', error)}, expected YAML"]
        ) from error
    except OmegaConfBaseException as error:
        raise InvalidStudyError([f"{path}:1 got {_first_line(error)}, expected a study"]) from error
    if not isinstance(content, dict) or root is None:
        raise InvalidStudyError(
            [f"{path}:1 got {type(content).__name__}, expected a mapping with name, model, data …"]
        )
    return root, content


def _overridden(config: Any, override: str, locations: dict[str, str], problems: list[Problem]) -> Any:
    """`config` with one override applied. Adds the locations of its key and of the keys above, and any problem."""
    key, equals, _ = override.partition("=")
    parts = key.split(".")
    for end in range(1, len(parts)):
        locations.setdefault(".".join(parts[:end]), "command line")
    locations[key] = "command line"
    if not equals:
        problems.append(Problem(key, f"got {override!r}, expected key=value"))
        return config
    value = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    for _ in parts:
        if isinstance(value, dict):
            value = next(iter(value.values()))
    return _merged(config, key, value, problems)


def _merged_content(config: Any, content: Mapping[Any, Any], problems: list[Problem]) -> Any:
    """`config` with the content of a study file. Keys that have a problem keep their defaults.

    A file without problems is merged at once: each merge copies the whole config, which takes 10 ms.
    """
    if not problems:
        with suppress(TypeError, OmegaConfBaseException):
            return OmegaConf.merge(config, content)
    wrong = {problem.key for problem in problems}
    for key, value in _leaves(content):
        if not any(name == key or name.startswith(f"{key}.") for name in wrong):
            config = _merged(config, key, value, problems)
    return config


def _merged(config: Any, key: str, value: Any, problems: list[Problem]) -> Any:
    """`config` with one more key set; unchanged, with a problem added, if the key or value is wrong."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        try:
            return OmegaConf.merge(config, nested)
        except TypeError:  # an override that replaces a list by a range cannot be merged
            OmegaConf.update(config, key, value, merge=False)
            return config
    except ConfigKeyError as error:
        wrong = str(error.full_key)
        similar = re.search(r"Did you mean[^']*'([^']+)'", str(error))
        hint = "this section has no key of this name"
        if similar:
            hint = f"did you mean {similar[1]}?"
        problems.append(Problem(wrong, f"got {wrong.rpartition('.')[2]}, expected a known key: {hint}"))
    except OmegaConfBaseException as error:
        problems.append(Problem(key, f"got {value!r}, expected {_expected(error)}"))
    return config


def _expected(error: Exception) -> str:
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}
    converted = re.search(r"could not be converted to (\w+)", str(error))
    if converted:
        return kinds.get(converted[1], converted[1])
    if "type hint 'Union[" in str(error):
        if "float" in str(error).rpartition("type hint")[2]:
            return "auto or a number"
        return "auto or a whole number"
    if "ListConfig" in str(error):
        return "a list"
    if "Merge error" in str(error) or "Cannot assign" in str(error):
        return "a mapping of keys to values"
    return f"something else: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _resolves(config: Any, problems: list[Problem]) -> bool:
    """Whether all interpolations have a value. Adds a problem otherwise."""
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", "") or "")
        problems.append(Problem(key, f"got {_first_line(error)}, expected a value that resolves"))
        return False
    return True


def _to_object(config: Any, problems: list[Problem]) -> StudyConfig:
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        problems.append(Problem("", f"got {_first_line(error)}, expected a study"))
        return StudyConfig(name="", model="")
    assert isinstance(loaded, StudyConfig)
    return loaded


def _leaves(section: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its dotted key. The space is one value: its keys are checked against the techniques."""
    for name, value in section.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and value and key != "space" and not key.endswith(".where"):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _lines(node: yaml.Node, above: str = "") -> Iterator[tuple[str, int]]:
    """Yield every key of a YAML document with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{above}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _lines(value, f"{key}.")
