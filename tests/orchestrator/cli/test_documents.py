"""Commands, links, names and modules in the documents exist."""

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
    """Yield the arguments of each `slimfront …` command in inline code or a code block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"`(slimfront [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    for line in lines:
        if line.startswith("slimfront "):
            # Optional arguments are in brackets.
            yield [word for word in shlex.split(line, comments=True)[1:] if not {"[", "]"} & {*word}]


def without_effects(app: typer.Typer) -> typer.Typer:
    """Return a copy of the app whose commands have the same options and do nothing."""
    copy = typer.Typer()
    for command in app.registered_commands:
        assert command.callback is not None
        copy.command(command.name)(functools.wraps(command.callback)(lambda **options: None))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        copy.add_typer(without_effects(group.typer_instance), name=group.name)
    if len(app.registered_commands) == 1:
        copy.callback()(lambda: None)  # without it, typer replaces a group of one command by that command
    return copy


def refusal(arguments: list[str]) -> str:
    """Return the error message for this command line; an empty string if the command accepts it."""
    # A command without arguments, as in a sentence, need only exist. The environment may hold the address.
    arguments = arguments if len(arguments) > 1 else [*arguments, "--help"]
    result = CliRunner().invoke(without_effects(app), arguments, env={"RAY_ADDRESS": "http://head:8265"})
    return "" if result.exit_code == 0 else result.output


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_exists(document: str) -> None:
    document_commands = list(commands((ROOT / document).read_text()))
    assert len(document_commands) >= 10
    refused = {}
    for arguments in document_commands:
        message = refusal(arguments)
        if message:
            refused[shlex.join(arguments)] = message
    assert not refused


@pytest.mark.parametrize(
    "line", ["slimfront frobnicate x", "slimfront up --dashboard 1", "slimfront export only-one"]
)
def test_an_unknown_command_is_detected(line: str) -> None:
    (arguments,) = commands(f"```sh\n{line}  # as if\n```\n")
    assert refusal(arguments)


def test_every_link_target_of_a_document_exists() -> None:
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
    """Return the missing names that a Python example imports from slimfront or reads from its modules."""
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
    """Return the cells of each table row in docs/architecture.md."""
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    rows = []
    for line in lines:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


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
