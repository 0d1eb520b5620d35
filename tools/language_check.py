"""Measure how plainly the code is written, and fail where a package exceeds a limit.

Without paths, the packages in the current folder are compared with the limits: exit code 0 if all are within them,
1 if one is above, 2 if a source cannot be read. With paths, all findings in them are listed, and no limit applies.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Rule = Literal["vague names", "headless words", "nested comprehensions", "conditional expressions"]
Unit = Literal["bindings", "docstring words", "code lines"]


class Limit(NamedTuple):
    """The largest allowed number of findings in every `per` units."""

    maximum: float
    per: int
    unit: Unit


LIMITS: dict[Rule, Limit] = {
    "vague names": Limit(1.5, per=100, unit="bindings"),
    "headless words": Limit(2.0, per=1000, unit="docstring words"),
    "nested comprehensions": Limit(0.1, per=100, unit="code lines"),
    "conditional expressions": Limit(1.2, per=100, unit="code lines"),
}
"""Chosen by hand: a reader meets one vague name in 67 bindings, and one conditional expression in 83 lines."""
PACKAGES = ("orchestrator", "jobs", "cluster")
LISTED_FINDINGS = 20
"""Findings that are listed of each package without --all: they fit on a screen."""
VAGUE = re.compile(
    "_*(?:after|alone|apart|asked|before|beside|each|every|found|given|gone|held|here|kept|known|least|left|made|mine"
    "|most|one|other|others|own|place|places|rest|said|seen|shown|some|taken|theirs|there|together|told|wanted|what)_*",
    re.IGNORECASE,
)
HEADLESS = re.compile(r"\b(?:what|who|whoever)\b", re.IGNORECASE)

_CODE_SPAN = re.compile(r"(`+).*?\1", re.DOTALL)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUOTED_CHARACTERS = 60
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NAMED = (*_DOCUMENTED[1:], ast.ExceptHandler, ast.MatchAs, ast.MatchStar)


class Finding(NamedTuple):
    """A line that breaks a rule, with the name or the phrase that breaks it."""

    file: str
    line: int
    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.text}"


@dataclass(frozen=True)
class Figures:
    """The findings in a source or a package, and the number of each unit that it contains."""

    findings: Sequence[Finding]
    totals: Counter[Unit]

    def count(self, rule: Rule) -> int:
        return sum(finding.rule == rule for finding in self.findings)

    def value(self, rule: Rule) -> float:
        """Return the number of findings in every `per` units of the rule's limit; 0 without any such unit."""
        limit = LIMITS[rule]
        return limit.per * self.count(rule) / max(1, self.totals[limit.unit])

    def exceeded(self) -> list[Rule]:
        return [rule for rule, limit in LIMITS.items() if self.value(rule) > limit.maximum]


def measure(source: str, file: str = "") -> Figures:
    """Measure the text of one Python file. SyntaxError if it is no Python."""
    tree = ast.parse(source, file)
    docstrings = list(_docstrings(tree))
    bindings = list(_bindings(tree))
    totals: Counter[Unit] = Counter()
    totals["bindings"] = len(bindings)
    totals["docstring words"] = sum(len(_WORD.findall(_prose(docstring))) for docstring in docstrings)
    totals["code lines"] = _code_lines(source, docstrings)
    rows: list[tuple[int, Rule, str]] = [*_headless_words(docstrings), *_expressions(tree)]
    rows += [(line, "vague names", name) for line, name in bindings if VAGUE.fullmatch(name)]
    return Figures([Finding(file, *row) for row in sorted(rows)], totals)


def combine(parts: Iterable[Figures]) -> Figures:
    """Add up the figures of several files."""
    figures = list(parts)
    findings = [finding for part in figures for finding in part.findings]
    return Figures(findings, sum((part.totals for part in figures), Counter()))


def report(packages: Mapping[str, Figures], every_finding: bool) -> list[str]:
    """Return the lines of a table of all figures and limits, and below it the findings of each package."""
    lines = [f"{'package':14}{'rule':25}{'count':>6}{'of':>8} {'unit':17}{'value':>7}{'limit':>7}{'per':>6}"]
    for package, figures in packages.items():
        for rule, (maximum, per, unit) in LIMITS.items():
            counts = f"{figures.count(rule):6,}{figures.totals[unit]:8,} {unit:17}"
            lines.append(f"{package:14}{rule:25}{counts}{figures.value(rule):7.2f}{maximum:7.2f}{per:6,}")
            if rule in figures.exceeded():
                lines[-1] += "  above"
    for figures in packages.values():
        if every_finding:
            lines += map(str, figures.findings)
        else:
            lines += worst(figures)
    return lines


def worst(figures: Figures) -> list[str]:
    """Return the lines of the first findings for exceeded rules; the file with most findings comes first."""
    exceeded = figures.exceeded()
    findings = [finding for finding in figures.findings if finding.rule in exceeded]
    counts = Counter(finding.file for finding in findings)
    findings.sort(key=lambda finding: (-counts[finding.file], finding.file, finding.line))
    lines = [str(finding) for finding in findings[:LISTED_FINDINGS]]
    if len(findings) > LISTED_FINDINGS:
        lines.append(f"and {len(findings) - LISTED_FINDINGS:,} more: --all lists every finding")
    return lines


def as_json(packages: Mapping[str, Figures]) -> str:
    """Return the figures, the limits and every finding as a JSON object by package."""
    content = {}
    for package, figures in packages.items():
        content[package] = {
            "totals": figures.totals,
            "values": {rule: figures.value(rule) for rule in LIMITS},
            "limits": {rule: limit._asdict() for rule, limit in LIMITS.items()},
            "findings": [finding._asdict() for finding in figures.findings],
        }
    return json.dumps(content, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the packages, or list the findings in the given paths; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="files or folders to list the findings of")
    parser.add_argument("--all", action="store_true", help="list every finding, of rules within limits too")
    parser.add_argument("--json", action="store_true", help="print the figures and every finding as JSON")
    options = parser.parse_args(arguments)
    try:
        packages = {path: _measure_path(Path(path)) for path in options.paths or PACKAGES}
    except (OSError, SyntaxError) as error:
        sys.stderr.write(f"cannot read {error.filename}: {error}\n")
        return 2
    if options.json:
        lines = [as_json(packages)]
    elif options.paths:
        lines = [str(finding) for figures in packages.values() for finding in figures.findings]
    else:
        lines = report(packages, options.all)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return int(not options.paths and any(figures.exceeded() for figures in packages.values()))


def _measure_path(path: Path) -> Figures:
    """Measure a file, or all Python files in a folder. OSError if there are none."""
    files = sorted(path.rglob("*.py")) or [path]
    return combine(measure(file.read_text(encoding="utf-8", errors="replace"), str(file)) for file in files)


def _bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each binding: variables, parameters, functions and classes."""
    augmented = {node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in augmented:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, _NAMED) and node.name is not None:
            yield node.lineno, node.name


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the docstrings of the module, its classes and functions, and the strings that follow an assignment."""
    for node in ast.walk(tree):
        statements: list[ast.AST] = []
        if isinstance(node, _DOCUMENTED):
            statements += node.body[:1]
        for previous, child in itertools.pairwise(ast.iter_child_nodes(node)):
            if isinstance(previous, (ast.Assign, ast.AnnAssign)):
                statements.append(child)
        for statement in statements:
            match statement:
                case ast.Expr(value=ast.Constant(value=str()) as text):
                    yield text


def _prose(docstring: ast.Constant) -> str:
    """Return the text without its code spans, with all its line ends."""
    return _CODE_SPAN.sub(lambda span: "\n" * span[0].count("\n"), str(docstring.value))


def _headless_words(docstrings: Iterable[ast.Constant]) -> Iterator[tuple[int, Rule, str]]:
    for docstring in docstrings:
        prose = _prose(docstring)
        for word in HEADLESS.finditer(prose):
            line = docstring.lineno + prose.count("\n", 0, word.start())
            phrase = prose[word.start() : word.start() + _QUOTED_CHARACTERS]
            yield line, "headless words", " ".join(phrase.split())


def _expressions(tree: ast.Module) -> Iterator[tuple[int, Rule, str]]:
    """Yield the conditional expressions, and the comprehensions that another one contains."""
    nested: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            nested.update(child for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            yield node.lineno, "conditional expressions", ast.unparse(node)[:_QUOTED_CHARACTERS]
        elif isinstance(node, _COMPREHENSIONS) and node in nested:
            yield node.lineno, "nested comprehensions", ast.unparse(node)[:_QUOTED_CHARACTERS]


def _code_lines(source: str, docstrings: Iterable[ast.Constant]) -> int:
    """Count the lines that are neither blank, nor a comment alone, nor part of a docstring."""
    lines = source.split("\n")
    excluded = {number for number, line in enumerate(lines, start=1) if not line.strip()}
    for docstring in docstrings:
        excluded.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            excluded.add(token.start[0])
    return len(lines) - len(excluded)


if __name__ == "__main__":
    sys.exit(main())
