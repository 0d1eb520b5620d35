"""Config: the study file. The one door to OmegaConf; reports every wrong key at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from orchestrator.space import Problem


@dataclass
class Text:
    """Windows of text: `samples` of `tokens` each, from a .txt, .jsonl, a folder of them, or `package:MODULE`."""

    path: str = MISSING
    samples: int = 128
    tokens: int = 512
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The text that quality is measured on: `tokens` in all, in windows of `window`."""

    path: str = MISSING
    tokens: int = 16384
    window: int = 512
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class Tasks:
    """Tasks of lm-eval, each `name` or `name:metric`. folder: of task files of your own; items: how many of each are
    read, all without it; shots: solved examples before each, the task's own number without it."""

    names: list[str] = field(default_factory=list)
    folder: str | None = None
    items: int | None = None
    shots: int | None = None


@dataclass
class Data:
    """choices: a .jsonl of multiple-choice items; labelled: a .jsonl of texts with labels, to classify; tasks:
    lm-eval's, for task_score."""

    evaluation: Evaluation | None = None
    calibration: Text | None = None
    train: Text | None = None
    choices: str | None = None
    labelled: str | None = None
    tasks: Tasks | None = None


@dataclass
class ObjectiveSpec:
    goal: str = MISSING
    limit: float | None = None


@dataclass
class TargetSpec:
    """price_per_hour: of such a machine, in any currency, for cost_per_million_tokens."""

    runtime: str = "torch"
    threads: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    price_per_hour: float | None = None


@dataclass
class SearchSpec:
    """order: `given` keeps the stages as they stand, `any` searches their order too. table: how many models are
    timed before the search, at most, to predict how fast all others are (`auto`: 32 where at least 64 candidates
    are tried; 0: multiply-adds stand in for time). rungs: the shares of the evaluation that candidates are measured on
    first, as long as they may be on the front (`auto`: by the length of the text; none: all of it at once)."""

    algorithm: str = "surrogate"
    order: str = "given"
    candidates: int = 24
    seed: int = 0
    table: Any = "auto"
    rungs: Any = "auto"


@dataclass
class TrackingSpec:
    """uri: MLflow's address; without one, SQLite in the study's folder. `none` switches tracking off."""

    uri: str | None = None


@dataclass
class ClusterSpec:
    """slots: how many jobs run at once (`auto`: one per core; on a cluster, as many as it could have). memory_gib: what
    they may use together on this machine. address: a running Ray's; without one, Ray is started here for as long as the
    study runs. stall_seconds: a job that reports no progress for so long hangs, is ended and tried again; null: never.
    price_per_hour: of each node, instead of what the cloud or a table says, in any currency.

    On a cluster, gpus: what each job holds of a GPU, or how many (`auto`: the part of one that its memory takes of
    device_gib); timing: labels of the nodes on which latency is measured (none: those like the first one that was);
    start_seconds: how long is waited for the first node, or for another when all are gone.

    Of jobs that train, ranks: the slots that each takes (`auto`: as few as hold it), zero_stage: what these share out
    (`auto`: as little as fits), micro_batch: rows at once (`auto`: as many as fit), device_gib: the memory that a
    slot's GPU has, or its share of a node without (`auto`: as the machine says; several ranks only by a GPU of here).
    They decide nothing of what the study finds."""

    slots: Any = "auto"
    memory_gib: float | None = None
    address: str | None = None
    stall_seconds: float | None = 3600.0
    price_per_hour: float | None = None
    gpus: Any = 0
    timing: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 900.0
    ranks: Any = "auto"
    zero_stage: Any = "auto"
    micro_batch: Any = "auto"
    device_gib: Any = "auto"


@dataclass
class BudgetSpec:
    """The most that a study may use, then nothing new is begun. money: in the currency of the nodes' prices; hours: by
    the clock while it runs."""

    money: float | None = None
    hours: float | None = None


@dataclass
class StudyConfig:
    """store: a folder, or s3://BUCKET/PREFIX with the options that cluster/s3.py tells."""

    name: str = MISSING
    model: str = MISSING
    task: str = "causal-lm"
    data: Data = field(default_factory=Data)
    objectives: dict[str, ObjectiveSpec] = field(default_factory=dict)
    target: TargetSpec = field(default_factory=TargetSpec)
    space: dict[str, Any] = field(default_factory=dict)
    search: SearchSpec = field(default_factory=SearchSpec)
    store: str = "runs"
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)


class InvalidStudy(ValueError):  # noqa: N818 - it is a study, and it is invalid
    """All that is wrong with a study, one line each: `file:line key: got X, expected Y`."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


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
        raise InvalidStudy([f"{place} got {getattr(error, 'problem', error)}, expected YAML"]) from error
    except OmegaConfBaseException as error:
        raise InvalidStudy([f"{path}:1 got {_first_line(error)}, expected a study"]) from error
    if not isinstance(given, dict) or root is None:
        raise InvalidStudy(
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
        raise InvalidStudy([f"{path}:1 got {reason}, expected a study file in YAML"]) from error


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
