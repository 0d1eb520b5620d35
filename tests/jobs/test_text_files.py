"""Untidy text files are read as their author meant them, or refused with the file and the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from jobs import data, text_files
from jobs.materials import TextSource

WHOLE = (0.0, 1.0)


def texts(path: Path, part: tuple[float, float] = WHOLE, **where: str) -> list[str]:
    """The documents of a path, as their joined pieces."""
    joined = []
    for pieces in text_files.documents(str(path), part, where):
        joined.append(pieces[0].separator.join(piece.text for piece in pieces))
    return joined


def test_line_ends_of_windows_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    assert texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    lines = '\ufeff{"text": "one"}\r\n\r\n{"text": "two"}\r\n'
    (tmp_path / "b.jsonl").write_bytes(lines.encode())
    assert texts(tmp_path / "b.jsonl") == ["one", "two"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    assert texts(tmp_path) == ["a.txt"]


def test_a_folder_under_a_hidden_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "texts"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("seen")
    assert texts(folder) == ["seen"]


def test_a_file_of_one_sentence_per_line_can_be_divided(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\nthree\nfour")
    assert texts(file) == ["one\ntwo\nthree\nfour"]
    assert texts(file, (0.5, 1.0)) == ["three\nfour"]


def test_blank_records_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "one"}\n')
    assert texts(file) == ["one"]
    file.write_text('{"text": ""}\n' * 400)
    with pytest.raises(ValueError, match=r"a\.jsonl contains no text: all of its records are empty"):
        texts(file)


@pytest.mark.parametrize(
    ("value", "text"),
    [("y", "y"), (2020, "2020"), (0.5, "0.5"), (True, "true"), (True, "True"), (False, "false")],
)
def test_where_compares_numbers_and_booleans_as_they_are_written(
    value: object, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": "wanted", "field": value}, {"text": "other", "field": "z"}, {"text": "without"}]
    file.write_text("\n".join(json.dumps(record) for record in records))
    assert texts(file, field=text) == ["wanted"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "is no JSON"),
        (b'{"text": "\xff"}', r"is not UTF-8 text \(byte 0xff at 10\)"),
        (b'{"text": "a\\ud800b"}', r"text: got the lone surrogate \\ud800"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"txt": "a"}', "text: got None, expected a string"),
        (b"[1]", "got list, expected a JSON object"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:2.*{message}"):
        texts(file)


def test_a_byte_of_another_encoding_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\ntwo\n\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt:4 is not UTF-8 text \(byte 0xe9 at 3\)"):
        texts(file)


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}')
    assert texts(file) == ["😀"]


def test_the_start_of_a_long_document_has_the_tokens_of_the_whole(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    paragraphs = [f"paragraph {number}  with   some words\nand another line" for number in range(500)]
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(paragraphs))
    whole = words("\n\n".join(paragraphs), add_special_tokens=False).input_ids
    for samples in (1, 7, 40):
        windows = data.windows(TextSource(str(file), samples, 64), words)
        assert windows.flatten().tolist() == whole[: samples * 64]


def test_a_long_document_is_not_tokenized_to_its_end(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some words of a paragraph\n\n" * 50_000)
    lengths = []

    class Counting:
        cls_token_id = None
        eos_token_id = words.eos_token_id

        def __call__(self, text: str, **options: bool) -> transformers.BatchEncoding:
            lengths.append(len(text))
            return words(text, **options)

    windows = data.windows(TextSource(str(file), 2, 16), Counting())  # type: ignore[arg-type]
    assert windows.shape == (2, 16)
    assert max(lengths) < 10_000


@pytest.mark.parametrize(
    ("part", "other_part", "share"),
    [((0.0, 0.5), (0.5, 1.0), 0), ((0.7, 1.0), (0.0, 1.0), 1), ((0.0, 1.0), (0.5, 1.0), 0.5)],
)
def test_the_overlap_of_two_parts_of_one_text(
    part: tuple[float, float], other_part: tuple[float, float], share: float, tmp_path: Path
) -> None:
    for name in ("a.txt", "copy.txt"):
        (tmp_path / name).write_text("one\n\ntwo")
    first = TextSource(str(tmp_path / "a.txt"), 1, 8, part=part)
    second = TextSource(str(tmp_path / "copy.txt"), 1, 8, part=other_part)
    assert data.overlap(first, second) == pytest.approx(share)


def test_other_texts_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    sources = [TextSource(str(tmp_path / name), 1, 8) for name in ("a.txt", "b.txt")]
    assert data.overlap(*sources) == 0
