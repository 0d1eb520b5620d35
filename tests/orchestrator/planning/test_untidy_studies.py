"""Study files with values that cannot be meant are refused at once, with file, line and key, and without secrets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.load import load
from orchestrator.config.problems import InvalidStudyError
from orchestrator.planning.prepare import prepare

SECRET = "CANARY0123456789"


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(InvalidStudyError) as error:
        prepare(load(file, overrides))
    return error.value.lines


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    study = yaml.safe_load(file.read_text())
    change(study)
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text + "\nname: other\n", r"name"),
        (lambda text: "a: " + "[" * 3000 + "]" * 3000 + "\n" + text, ":1 got too many nested levels"),
        (lambda text: "a: " + "{b: " * 60 + "1" + "}" * 60 + "\n" + text, "more than 50 nested levels"),
        (lambda text: text + "\n#" + "x" * 2**20, ":1 got 1.0 MiB, expected a study of at most 1 MiB"),
        (lambda text: "", ":1 got NoneType, expected a mapping"),
        (lambda text: "- a\n", ":1 got list, expected a mapping"),
        (lambda text: text.replace("name: tiny", "name: ${store}").replace("store: ", "store: ${name} #"),
         "Recursive interpolation"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_study_is_one_line(
    change: Callable[[str], str], line: str, study_file: Path
) -> None:
    study_file.write_text(change(study_file.read_text()))
    (message,) = problems(study_file)
    assert message.startswith(str(study_file))
    assert line in message


def test_a_byte_order_mark_is_no_part_of_a_study(study_file: Path) -> None:
    study_file.write_text("\ufeff" + study_file.read_text(), encoding="utf-8")
    assert prepare(load(study_file)).config.name == "tiny"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["budget: {hours: %s}", "cluster: {memory_gib: %s}"])
def test_numbers_that_are_not_finite_are_refused(value: str, key: str, study_file: Path) -> None:
    text = study_file.read_text()
    section = key.partition(":")[0]
    other_sections = {name: part for name, part in yaml.safe_load(text).items() if name != section}
    study_file.write_text(yaml.safe_dump(other_sections, sort_keys=False) + key % value + "\n")
    (message,) = problems(study_file)
    assert "expected a finite number" in message


def test_a_number_in_the_space_that_is_not_finite_is_refused_by_its_key(study_file: Path) -> None:
    space = {"sparse": {"magnitude": {"sparsity": float("nan")}}}
    (message,) = problems(changed(study_file, lambda study: study.update(space=space)))
    assert "space.sparse.magnitude.sparsity: got nan" in message


@pytest.mark.parametrize("key", ["name", "model", "store"])
@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "MY_API_KEY"])
def test_a_secret_of_the_environment_is_refused_and_not_shown(
    key: str, variable: str, study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, SECRET)
    lines = problems(changed(study_file, lambda study: study.update({key: f"${{oc.env:{variable}}}"})))
    assert f"{key}: got the environment variable {variable}, expected no secret" in lines[0]
    assert SECRET not in "".join(lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((f"name={name}", "the store has a folder of this name for itself")
          for name in ("tmp", "cache", "objects", "records", "inputs", "downloads", "TMP")),
        (f"name={'a' * 300}", "expected at most 100 characters"),
        ("name=../../x", "expected letters, digits"),
        ("store=/etc/hostname", "/etc/hostname is not a folder"),
        ("store=/proc/x", "/proc is not on a disk"),
        (f"tracking.uri=http://user:{SECRET}@127.0.0.1:5999", "expected an address without a password"),
        ("tracking.uri=http://169.254.169.254/latest", "not of a cloud's metadata service"),
        ("tracking.uri=http://metadata.google.internal/", "not of a cloud's metadata service"),
        ("tracking.uri=file:///etc", "an address that begins with http:"),
        ("tracking.uri=foo://bar", "an address that begins with http:"),
        ("cluster.slots=100000", "each worker of this machine needs"),
        ("cluster.gpus=64", "0 or auto, or cluster.address with it"),
        ("cluster.stall_seconds=0.001", "expected at least 1, or null"),
        ("objectives.size_bytes.limit=10", "the smallest one found has"),
        ("model=package:../../etc", "the Python package is not installed"),
        ("model=package:nosuch.sub", "the Python package is not installed"),
    ],
)  # fmt: skip
def test_a_value_that_no_study_can_have_is_refused(override: str, message: str, study_file: Path) -> None:
    lines = problems(study_file, override)
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert SECRET not in lines[0]


@pytest.mark.parametrize(
    ("space", "key", "message"),
    [
        ({"recover": {"finetune": {"rank": 500}}}, "recover.finetune.rank", "finetune.rank=500 is outside"),
        ({"bits": {"rtn": {"bits": 4, "correction_rank": 4096}}}, "bits.rtn.correction_rank", "outside"),
        ({"depth": {"drop_layers": {"count": [9, 20]}}}, "depth.drop_layers.count", "outside [0, 3]"),
    ],
)
def test_an_option_that_this_model_cannot_have_is_refused(
    space: dict[str, Any], key: str, message: str, study_file: Path
) -> None:
    lines = problems(changed(study_file, lambda study: study.update(space=space)))
    matching = [line for line in lines if f" space.{key}: got " in line and message in line]
    assert len(matching) == 1, lines


def test_an_option_that_one_corner_allows_is_accepted(study_file: Path) -> None:
    space = {"depth": {"drop_layers": {"count": [1, 3]}}}
    assert prepare(load(changed(study_file, lambda study: study.update(space=space)))).space.size() == 3


def test_a_model_that_cannot_be_trusted_is_one_line(
    study_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{}")
    (line,) = problems(study_file, f"model={model}")
    assert "model: got the tokenizer in" in line
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "text_config": {"auto_map": {"A": "x--y.Z"}}}))
    (line,) = problems(study_file, f"model={model}")
    assert "refers to code" in line
    (model / "config.json").write_text("[]")
    (line,) = problems(study_file, f"model={model}")
    assert "config.json contains a list" in line


def test_windows_beyond_the_models_positions_are_refused(study_file: Path) -> None:
    lines = problems(study_file, "data.calibration.tokens=300", "data.calibration.samples=1")
    assert any("windows of 300 tokens, expected at most 256" in line for line in lines)


def test_evaluation_on_the_training_text_is_refused(study_file: Path) -> None:
    space = {"recover": {"finetune": {"steps": 2}}}
    parts = ("data.train.part=[0.0, 1.0]", "data.evaluation.part=[0.2, 0.4]", "data.evaluation.tokens=128")
    lines = problems(changed(study_file, lambda study: study.update(space=space)), *parts)
    assert any("data.evaluation: got a text that is all in data.train" in line for line in lines)
