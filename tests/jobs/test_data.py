"""Text becomes windows of tokens; unreadable sources are refused with their location and a suggestion."""

import dataclasses
import json
from pathlib import Path

import pytest
import transformers

from jobs import data
from jobs.materials import TextSource
from jobs.models import loading


def jsonl(file: Path, *records: object) -> str:
    file.write_text("\n".join(json.dumps(record) for record in records))
    return str(file)


def test_documents_are_joined_with_end_of_text_tokens(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "cd"})
    row = data.windows(TextSource(path, samples=1, tokens=3), words)[0].tolist()
    first = words("ab").input_ids
    assert row == [*first, words.eos_token_id, *words("cd").input_ids][:3]


def test_part_splits_a_source_without_overlap(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": letter * 40} for letter in "abcd"))

    def letters(low: float, high: float) -> set[str]:
        windows = data.windows(TextSource(path, 1, 10, part=(low, high)), words)
        return set(words.decode(windows[0], skip_special_tokens=True))

    assert letters(0.0, 0.25) == {"a"}
    assert letters(0.75, 1.0) == {"d"}


def test_one_text_file_is_split_between_paragraphs_and_stays_one_document(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    half = TextSource(str(tmp_path / "a.txt"), 1, 4, part=(0.5, 1.0))
    assert data.windows(half, words)[0].tolist() == words("three\n\nfour").input_ids[:4]


def test_where_selects_documents_by_field(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "aaaa" * 9, "genre": "x"}, {"text": "bbbb" * 9, "genre": "y"})
    row = data.windows(TextSource(path, 1, 5, where={"genre": "y"}), words)[0]
    assert set(words.decode(row)) == {"b"}


def test_a_folder_is_read_in_the_order_of_file_names(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    row = data.windows(TextSource(str(tmp_path), 1, 3), words)[0].tolist()
    assert row == [*words("first").input_ids, words.eos_token_id, *words("second").input_ids][:3]


def test_a_python_module_is_read_and_not_run(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_texts.py").write_text("topics = {'a': 'hello hello hello'}\nraise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = data.windows(TextSource("package:some_texts", 1, 3), words)[0].tolist()
    assert row == words("hello hello hello").input_ids[:3]


def test_a_text_that_is_too_short_is_refused_with_the_possible_samples(
    text_file: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"holds \d+ tokens, 9999 samples of 512 .* at most \d+ samples"):
        data.windows(TextSource(str(text_file), 9999, 512), words)


def test_windows_of_an_encoder_have_the_special_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    (tmp_path / "a.txt").write_text("a b a b a b a b")
    windows = data.windows(TextSource(str(tmp_path / "a.txt"), 2, 5), tokenizer)
    assert windows.tolist() == [[2, 4, 5, 4, 3], [2, 5, 4, 5, 3]]


def test_the_digest_depends_on_content_and_options_but_not_on_the_path(tmp_path: Path) -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (TextSource(str(tmp_path / f"{name}.txt"), 2, 8) for name in "abc")
    assert data.digest(a) == data.digest(b)
    assert len({data.digest(a), data.digest(c), data.digest(dataclasses.replace(a, tokens=9))}) == 3


def test_windows_are_tokenized_once_for_all_artifacts_of_a_model(
    text_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    loading.save(loading.load(tiny_llama), tmp_path / "copy", {})
    source = TextSource(str(text_file), 3, 7)
    first = data.windows_for(source, tiny_llama)
    assert data.windows_for(source, tmp_path / "copy") is first
    assert first.shape == (3, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere.txt"}, "no file or folder nowhere.txt"),
        ({"path": "package:no_such_module_here"}, "no such Python module"),
        ({"part": (0.5, 0.5)}, "rising pair"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"where": {"genre": "news"}}, "fields of .jsonl documents"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_before_it_is_read(
    text_file: Path, change: dict[str, object], message: str
) -> None:
    source = dataclasses.replace(TextSource(str(text_file), 1, 8), **change)  # type: ignore[arg-type]
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        data.check(source)


def test_a_record_without_text_is_refused_with_its_line(
    tmp_path: Path, words: transformers.PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"txt": "odd"})
    with pytest.raises(ValueError, match=r"a\.jsonl:2 text: got None"):
        data.windows(TextSource(path, 1, 8), words)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "context"),
        ({"context": "", "choices": ["a"], "answer": 0}, "at least two"),
        ({"context": "", "choices": ["a", "b"], "answer": 2}, "an index below 2"),
        ({"context": "", "choices": ["a", "b"], "answer": True}, "an index below 2"),
    ],
)
def test_an_invalid_item_is_refused_with_its_line(tmp_path: Path, record: object, message: str) -> None:
    good = {"context": "c", "choices": ["a", "b"], "answer": 1}
    with pytest.raises(ValueError, match=rf"q\.jsonl:2 .*{message}"):
        data.choices(jsonl(tmp_path / "q.jsonl", good, record))


def test_valid_items_are_read_unchanged(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", {"context": "c", "choices": ["a", "b"], "answer": 1})
    assert data.choices(path) == [data.Question("c", ("a", "b"), 1)]
