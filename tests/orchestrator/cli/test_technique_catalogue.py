"""The documentation tells of every technique, and of all that each refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs import techniques
from orchestrator.cli import technique_catalogue
from orchestrator.cli.technique_catalogue import Entry

DOCS = Path(__file__).parents[3] / "docs" / "techniques.md"


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The text under each heading of the page."""
    parts = re.split(r"^## (.+)$", DOCS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    "entry", technique_catalogue.entries(techniques.names()), ids=lambda entry: entry.name
)
def test_the_page_tells_of_each_technique_its_options_and_its_paper(
    entry: Entry, sections: dict[str, str]
) -> None:
    text = sections[entry.name]
    identifiers = re.findall(r"arXiv:\d+\.\d+", entry.paper)
    assert not identifiers or any(one in text for one in identifiers)
    assert "Cost" in text


@pytest.mark.parametrize(
    "entry", technique_catalogue.entries(techniques.names()), ids=lambda entry: entry.name
)
def test_the_page_tells_what_each_technique_refuses(entry: Entry, sections: dict[str, str]) -> None:
    """The table of refusals holds every pair, and nothing that is not refused."""
    row = next(
        (line for line in sections["Unsupported models"].splitlines() if f"| {entry.name} |" in line), ""
    )
    told = {model for models in entry.refusals().values() for model in models}
    shown = {part.strip() for part in row.split("|")[2].split(",")} if row else set()
    assert shown == told
