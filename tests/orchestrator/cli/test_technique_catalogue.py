"""The documentation describes every technique and all of its refusals."""

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
    """Return the text under each heading of the page."""
    parts = re.split(r"^## (.+)$", DOCS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    "entry", technique_catalogue.entries(techniques.names()), ids=lambda entry: entry.name
)
def test_the_page_cites_the_paper_and_states_the_cost_of_each_technique(
    entry: Entry, sections: dict[str, str]
) -> None:
    text = sections[entry.name]
    identifiers = re.findall(r"arXiv:\d+\.\d+", entry.paper)
    assert not identifiers or any(identifier in text for identifier in identifiers)
    assert "Cost" in text


@pytest.mark.parametrize(
    "entry", technique_catalogue.entries(techniques.names()), ids=lambda entry: entry.name
)
def test_the_page_lists_the_refusals_of_each_technique(entry: Entry, sections: dict[str, str]) -> None:
    """The table of refusals holds exactly the refused pairs."""
    row = next(
        (line for line in sections["Unsupported models"].splitlines() if f"| {entry.name} |" in line), ""
    )
    refused = {model for models in entry.refusals().values() for model in models}
    documented = {part.strip() for part in row.split("|")[2].split(",")} if row else set()
    assert documented == refused
