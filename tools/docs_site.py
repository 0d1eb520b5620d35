"""Hooks of the documentation site: pages from files outside docs/, an API page for each folder, navigation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "jobs", "cluster")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/LOG.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Files outside docs/ that become pages, each with its name on the site."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the decisions and the API pages to the navigation."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    reference = [{folder: page} for folder, page, _ in api_pages()]
    navigation: list[Any] = config.nav or []
    navigation.append({"Decisions": [f"decisions/{file.name}" for file in decisions]})
    navigation.append({"API reference": reference})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text, Path(source).parent)))
    for folder, page, modules in api_pages():
        content = "\n\n".join([f"# {folder}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of pages in docs/ that lead outside it."""
    if page.file.generated_by is not None:
        return markdown
    return site_links(markdown, Path("docs") / Path(page.file.src_uri).parent)


def site_links(text: str, folder: Path) -> str:
    """Rewrite relative links of a text in `folder` (relative to the repository) for the site.

    A link to a page of the site leads there. A link to another file of the repository becomes its text: the site does
    not contain that file.
    """
    depth = len(folder.relative_to("docs").parts) if folder.parts[:1] == ("docs",) else 0

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (ROOT / folder / target).resolve()
        if not path.exists():
            return match[0]  # a broken link: the strict build names it
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            page = PAGES[name]
        elif name.startswith("docs/") and path.is_file():
            page = name.removeprefix("docs/")
        else:
            return label
        return f"{image}[{label}]({'../' * depth}{page}{anchor})"

    return _LINK.sub(replace, text)


def api_pages() -> Iterator[tuple[str, str, list[str]]]:
    """Yield each package folder, its page, and its public modules."""
    for package in PACKAGES:
        folders = [ROOT / package, *sorted(path for path in (ROOT / package).iterdir() if path.is_dir())]
        for folder in folders:
            modules = [file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
            if modules:
                name = folder.relative_to(ROOT).as_posix()
                paths = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in modules]
                yield name, f"api/{name.replace('/', '-')}.md", paths
