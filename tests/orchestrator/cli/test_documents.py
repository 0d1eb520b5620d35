"""What documents tell readers to type is there to be typed."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.cli.app import app

ROOT = Path(__file__).parents[3]
DOCUMENTS = ["README.md", "docs/cluster.md"]
WITH_PYTHON = ["README.md", "CONTRIBUTING.md", "docs/search.md"]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `slimfront …` in code, in a line or a block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"`(slimfront [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    for line in lines:
        if line.startswith("slimfront "):
            # What may be left out stands in brackets.
            yield [word for word in shlex.split(line, comments=True)[1:] if not {"[", "]"} & {*word}]


def idle(app: typer.Typer) -> typer.Typer:
    """The same commands with the same options, which do nothing."""
    copy = typer.Typer()
    for one in app.registered_commands:
        assert one.callback is not None
        copy.command(one.name)(functools.wraps(one.callback)(lambda **given: None))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        copy.add_typer(idle(group.typer_instance), name=group.name)
    if len(app.registered_commands) == 1:
        copy.callback()(lambda: None)  # else a group of one command would be that command
    return copy


def refusal(words: list[str]) -> str:
    """What the command would answer to this line before it does anything; empty where it takes it."""
    # A command's name alone, in a sentence, need only be one; the cluster's address may be in the environment.
    words = words if len(words) > 1 else [*words, "--help"]
    done = CliRunner().invoke(idle(app), words, env={"RAY_ADDRESS": "http://head:8265"})
    return "" if done.exit_code == 0 else done.output


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_is_one_that_there_is(document: str) -> None:
    found = list(commands((ROOT / document).read_text()))
    assert len(found) >= 10
    refused = {shlex.join(words): said for words in found if (said := refusal(words))}
    assert not refused


@pytest.mark.parametrize(
    "line", ["slimfront frobnicate x", "slimfront up --dashboard 1", "slimfront export only-one"]
)
def test_a_command_that_there_is_not_is_found(line: str) -> None:
    (words,) = commands(f"```sh\n{line}  # as if\n```\n")
    assert refusal(words)


def test_every_place_that_a_document_links_to_is_there() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        headings = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" not in target:
                assert not path or ((ROOT / document).parent / path).exists(), target
                assert path or anchor in headings, target


def missing_names(source: str) -> list[str]:
    """The names that a Python example imports from slimfront, or reads from its modules, and that do not exist."""
    tree = ast.parse(source)
    modules: dict[str, ModuleType] = {}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in {
            "jobs",
            "orchestrator",
        }:
            parent = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    value = getattr(parent, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                except ImportError:
                    missing.append(f"{node.module}.{alias.name}")
                    continue
                if isinstance(value, ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    return missing


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_every_name_in_a_python_example_exists(document: str) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    assert [name for example in examples for name in missing_names(example)] == []


def test_a_missing_name_in_a_python_example_is_reported() -> None:
    example = "from jobs.models import loading, nothing\nloading.load()\nloading.unload()\n"
    assert missing_names(example) == ["jobs.models.nothing", "jobs.models.loading.unload"]


def architecture_rows() -> list[list[str]]:
    """The cells of each row of the tables in docs/architecture.md."""
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("package", ["orchestrator", "jobs", "cluster"])
def test_the_architecture_page_has_every_module_with_its_floor(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == [package])
    floors = {
        module: floor
        for floor, layer in enumerate(reversed(layers), 1)
        for module in layer.split(" | ")
        if module != "__main__"
    }
    names = {path.name for path in (ROOT / package).iterdir()}
    rows = {row[0]: row[1] for row in architecture_rows() if len(row) == 3 and row[1].isdigit()}
    for module, floor in floors.items():
        folder_or_file = f"{module}.py" if f"{module}.py" in names else f"{module}/"
        assert rows.get(folder_or_file) == str(floor), folder_or_file


def test_the_architecture_page_has_the_doors_of_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    expected: dict[str, set[str]] = {}
    for contract in contracts:
        for line in contract.get("ignore_imports", []):
            importer, _, library = line.partition(" -> ")
            path = importer.removesuffix(".*").replace(".", "/")
            door = f"{path}/" if importer.endswith(".*") else f"{path}.py"
            expected.setdefault(library, set()).add(door)
    stated: dict[str, set[str]] = {}
    for row in architecture_rows():
        if len(row) == 2:
            for library in row[0].replace("lm-eval", "lm_eval").split(", "):
                stated.setdefault(library, set()).update(re.findall(r"[a-z]+/[\w/]+(?:\.py)?", row[1]))
    assert set(expected) <= set(stated)
    for library, doors in expected.items():
        assert doors <= stated[library], library
        assert all((ROOT / door).exists() for door in stated[library])
