"""The figures of small sources, counted by hand, and the exit codes and messages of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.language_check import (
    LIMITS,
    LISTED_FINDINGS,
    PACKAGES,
    Rule,
    as_json,
    combine,
    main,
    measure,
    report,
)

PLAIN = '''"""Count the measured candidates."""

# A comment counts as no code.
LIMIT = 3
"""The largest number of candidates."""


def measured(candidates: list[str]) -> list[str]:
    """Return the candidates that have a measurement."""
    return [candidate for candidate in candidates if candidate]
'''


def found_by(rule: Rule, source: str) -> list[tuple[int, str]]:
    return [(finding.line, finding.text) for finding in measure(source).findings if finding.rule == rule]


def write_packages(folder: Path, source: str) -> None:
    for package in PACKAGES:
        (folder / package).mkdir()
        (folder / package / "module.py").write_text(source, encoding="utf-8")


def test_a_plain_source_has_its_units_counted_and_no_findings() -> None:
    figures = measure(PLAIN)
    assert figures.findings == []
    # LIMIT, measured, candidates, candidate; 4 + 5 + 7 words; an assignment, a def and its return.
    assert figures.totals == {"bindings": 4, "docstring words": 16, "code lines": 3}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("one = 1", ["one"]),
        ("a, (told, *rest) = b", ["told", "rest"]),
        ("kept: int", ["kept"]),
        ("for made in b: pass", ["made"]),
        ("with b as held: pass", ["held"]),
        ("try: pass\nexcept OSError as said: pass", ["said"]),
        ("if (here := b): pass", ["here"]),
        ("a = [b for own in b]", ["own"]),
        ("def f(given, *others, seen=1, **left): pass", ["given", "others", "left", "seen"]),
        ("f = lambda asked: asked", ["asked"]),
        ("async def known(): pass", ["known"]),
        ("class Place: pass", ["Place"]),
        (
            "match b:\n    case [what, *most]: pass\n    case OSError() as beside: pass",
            ["what", "most", "beside"],
        ),
        ("_found = _MADE = 1", ["_found", "_MADE"]),
    ],
)
def test_a_vague_name_counts_wherever_it_is_bound(source: str, names: list[str]) -> None:
    assert sorted(name for _, name in found_by("vague names", source)) == sorted(names)


@pytest.mark.parametrize(
    "source",
    ["one += 1", "print(found)", "a.left = 1", "place_count = ones = 1", "f(given=1)", "import a as one"],
)
def test_a_use_a_longer_name_and_an_augmented_assignment_are_no_vague_bindings(source: str) -> None:
    assert found_by("vague names", source) == []


def test_an_augmented_assignment_is_no_binding_at_all() -> None:
    assert measure("count = 0\ncount += 1\ntotals[count] += 1").totals["bindings"] == 1


def test_the_share_of_vague_names_is_of_all_bindings() -> None:
    # f, given, width; found; 4 bindings, 2 of them vague.
    assert measure("def f(given, width):\n    found = 1").value("vague names") == 50.0


def test_headless_words_count_in_every_kind_of_docstring_with_their_lines() -> None:
    source = '''"""What runs."""
class Study:
    """A study.

    It reports who failed.
    """
    size: int = 0
    """For whoever asks."""
    async def run(self):
        """Runs what is new and what is old."""
'''
    assert found_by("headless words", source) == [
        (1, "What runs."),
        (5, "who failed."),
        (8, "whoever asks."),
        (10, "what is new and what is old."),
        (10, "what is old."),
    ]
    # 2 + 2 + 4 + 3 + 8 words.
    assert measure(source).value("headless words") == pytest.approx(1000 * 5 / 19)


def test_code_spans_other_words_and_other_strings_are_not_headless() -> None:
    source = '''"""The models whose size `what` and ``who`` limit, and somewhat more."""
print("what")
"what follows no assignment"
# what a comment says
'''
    assert found_by("headless words", source) == []
    # The, models, whose, size, and, limit, and, somewhat, more.
    assert measure(source).totals["docstring words"] == 9


def test_a_code_span_over_two_lines_keeps_the_line_of_a_later_word() -> None:
    assert found_by("headless words", '"""A `code\nspan`\nand what follows."""') == [(3, "what follows.")]


def test_each_comprehension_inside_another_counts_once() -> None:
    source = "a = [[c for c in b] for b in d]\ne = {f: sum(h for h in {i for i in f}) for f in d}\nj = [k for k in d]\n"
    assert found_by("nested comprehensions", source) == [
        (1, "[c for c in b]"),
        (2, "(h for h in {i for i in f})"),
        (2, "{i for i in f}"),
    ]
    assert measure(source).value("nested comprehensions") == 100.0


def test_two_loops_of_one_comprehension_are_not_nested() -> None:
    assert found_by("nested comprehensions", "a = [c for b in d for c in b]") == []


def test_conditional_expressions_count_per_code_line() -> None:
    source = "a = b if c else d\n\n# A comment.\ne = (\n    f if g else h if i else j  # two\n)\n"
    assert found_by("conditional expressions", source) == [
        (1, "b if c else d"),
        (5, "f if g else h if i else j"),
        (5, "h if i else j"),
    ]
    assert measure(source).value("conditional expressions") == pytest.approx(100 * 3 / 4)


def test_code_lines_include_strings_that_are_no_docstrings() -> None:
    # The assignment's three lines but the blank one; the # inside the string is no comment.
    assert measure('text = f("""\n# first\n\n""")\n').totals["code lines"] == 3


def test_figures_of_files_add_up() -> None:
    figures = combine([measure("one = 1", "a.py"), measure("count = 1", "b.py"), measure("size = 1", "c.py")])
    assert figures.totals == {"bindings": 3, "code lines": 3}
    assert figures.value("vague names") == pytest.approx(100 / 3)
    assert figures.exceeded() == ["vague names"]


def test_an_empty_file_exceeds_nothing() -> None:
    assert measure("").exceeded() == []


@pytest.mark.parametrize(("names", "exceeded"), [(200, []), (199, ["vague names"])])
def test_a_value_at_its_limit_is_allowed(names: int, exceeded: list[Rule]) -> None:
    assert LIMITS["vague names"].maximum == 1.5
    plain = "".join(f"count_{number} = 1\n" for number in range(names - 3))
    assert measure(plain + "one = 1\n" * 3).exceeded() == exceeded


def test_the_file_with_most_findings_comes_first_and_only_exceeded_rules_are_listed() -> None:
    many_lines = "count = 1\n" * 300
    figures = combine(
        [measure("one = 1", "a.py"), measure("told = held = 1\nb = c if d else e\n" + many_lines, "b.py")]
    )
    # 3 of 304 bindings are below 1.5 %.
    assert report({"jobs": figures}, every_finding=False)[5:] == []
    figures = combine(
        [measure("one = 1", "a.py"), measure("told = held = 1\nb = c if d else e\n" + 90 * "f(1)\n", "b.py")]
    )
    assert report({"jobs": figures}, every_finding=False)[5:] == [
        "b.py:1: vague names: held",
        "b.py:1: vague names: told",
        "a.py:1: vague names: one",
    ]
    assert "b.py:2: conditional expressions: c if d else e" in report({"jobs": figures}, every_finding=True)


def test_no_more_than_the_worst_are_listed_without_all() -> None:
    figures = {"jobs": measure("one = 1\n" * (LISTED_FINDINGS + 2), "a.py")}
    worst, every = (report(figures, every_finding)[5:] for every_finding in (False, True))
    assert len(worst) == LISTED_FINDINGS + 1
    assert worst[-1] == "and 2 more: --all lists every finding"
    assert len(every) == LISTED_FINDINGS + 2


def test_packages_within_the_limits_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packages(tmp_path, PLAIN)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "above" not in capsys.readouterr().out


def test_one_package_above_a_limit_fails_with_the_line_and_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packages(tmp_path, PLAIN)
    (tmp_path / "cluster" / "nested").mkdir()
    (tmp_path / "cluster" / "nested" / "store.py").write_text("size = 1\nheld = 2\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    # 1 of 6 bindings.
    assert [line.split() for line in lines if line.endswith("above")] == [
        ["cluster", "vague", "names", "1", "6", "bindings", "16.67", "1.50", "100", "above"]
    ]
    assert lines[-1] == f"{Path('cluster/nested/store.py')}:2: vague names: held"


def test_given_paths_are_listed_without_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a folder" / "module.py"
    file.parent.mkdir()
    file.write_text("one = 1\n", encoding="utf-8")
    for path in (file, file.parent):
        assert main([str(path)]) == 0
        assert capsys.readouterr().out == f"{file}:1: vague names: one\n"


def test_json_holds_figures_limits_and_findings() -> None:
    content = json.loads(as_json({"jobs": measure("one = 1\nsize = 2\n", "a.py")}))["jobs"]
    assert content["values"]["vague names"] == 50.0
    assert content["limits"]["vague names"] == {"maximum": 1.5, "per": 100, "unit": "bindings"}
    assert content["totals"] == {"bindings": 2, "docstring words": 0, "code lines": 2}
    assert content["findings"] == [{"file": "a.py", "line": 1, "rule": "vague names", "text": "one"}]


def test_json_still_fails_above_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packages(tmp_path, "one = 1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out).keys() == {*PACKAGES}


@pytest.mark.parametrize("content", [None, b"def f(:\n", b"\xff\n"])
def test_a_source_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    file = tmp_path / "folder" / "module.py"
    file.parent.mkdir()
    if content is not None:
        file.write_bytes(content)
    assert main([str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"cannot read {file}: ")


def test_a_package_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2


def test_the_check_is_within_its_own_limits() -> None:
    source = (Path(__file__).parents[2] / "tools" / "language_check.py").read_text(encoding="utf-8")
    assert measure(source).exceeded() == []
