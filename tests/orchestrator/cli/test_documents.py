"""What documents tell readers to type is there to be typed."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.cli.app import app

ROOT = Path(__file__).parents[3]
DOCUMENTS = ["README.md", "docs/cluster.md"]


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
