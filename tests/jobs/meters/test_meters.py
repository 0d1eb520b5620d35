"""Each number means what it says: checked against slow obvious versions and hand-worked cases."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data import Question
from jobs.materials import Materials, TextSource
from jobs.measurement.meter import ShippedModel, run_meter
from jobs.meters import agreement, choices, labels, size, text
from jobs.models import loading, tokenizers
from jobs.runtimes import on_torch


@pytest.fixture
def subject(tiny_llama: Path, text_file: Path) -> ShippedModel:
    materials = Materials(str(tiny_llama), "causal-lm", TextSource(str(text_file), samples=6, tokens=20))
    return ShippedModel(tiny_llama, tiny_llama, materials)


@pytest.fixture
def encoder(tiny_bert: Path, text_file: Path) -> ShippedModel:
    materials = Materials(str(tiny_bert), "embedding", TextSource(str(text_file), samples=6, tokens=20))
    return ShippedModel(tiny_bert, tiny_bert, materials)


def questions(subject: ShippedModel, file: Path, *items: dict[str, object]) -> ShippedModel:
    file.write_text("\n".join(json.dumps(item) for item in items))
    return dataclasses.replace(subject, materials=dataclasses.replace(subject.materials, choices=str(file)))


class Certain:
    """Says with near certainty that the next token is this one plus 1; ten outcomes."""

    def answer(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return 50.0 * np.eye(10, dtype=np.float32)[(rows + 1) % 10]


def test_perplexity_and_accuracy_are_those_of_the_obvious_loop(subject: ShippedModel) -> None:
    rows = subject.evaluation()
    losses, hits = [], []
    with torch.no_grad():
        for row in rows:
            said = torch.from_numpy(subject.runner.answer(row[None].numpy()))[0].log_softmax(-1)
            for at in range(len(row) - 1):
                losses.append(-said[at, row[at + 1]].item())
                hits.append(said[at].argmax().item() == row[at + 1].item())
    found = text.measure(subject)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert found.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_a_model_that_is_sure_and_right_has_perplexity_1() -> None:
    loss, hits = text.score(Certain(), torch.arange(20).view(2, 10) % 10)
    assert loss.exp().tolist() == pytest.approx([1.0, 1.0])
    assert hits.tolist() == [1.0, 1.0]


def test_errors_of_text_are_clustered_by_window(subject: ShippedModel) -> None:
    losses, hits = text.score(subject.runner, subject.evaluation())
    found = text.measure(subject)
    assert found.errors["accuracy"] == pytest.approx(hits.std().item() / math.sqrt(6), rel=1e-3)
    clustered = losses.mean().exp().item() * losses.std().item() / math.sqrt(6)
    assert found.errors["perplexity"] == pytest.approx(clustered, rel=1e-2)


def test_fidelity_reads_the_first_windows(subject: ShippedModel) -> None:
    half = dataclasses.replace(subject, fidelity=0.5)
    assert torch.equal(half.evaluation(), subject.evaluation()[:3])
    assert len(dataclasses.replace(subject, fidelity=0.01).evaluation()) == 1


def test_a_model_of_nan_is_no_measurement(subject: ShippedModel, tmp_path: Path) -> None:
    model = loading.load(subject.original)
    next(model.blocks.parameters()).fill_(math.nan)
    loading.save(model, tmp_path / "broken", {})
    with pytest.raises(FloatingPointError, match="perplexity"):
        text.measure(dataclasses.replace(subject, folder=tmp_path / "broken"))


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_number() -> None:
    found = run_meter({"four": torch.tensor([1.0, 2.0, 3.0, 4.0]), "one": torch.tensor([3.0])})
    assert found.metrics == {"four": 2.5, "one": 3.0}
    assert found.errors == {"four": pytest.approx(0.6454972), "one": 0.0}
    assert found.items == {"four": [1.0, 2.0, 3.0, 4.0], "one": [3.0]}


def test_the_likelihood_of_a_choice_is_that_of_its_tokens_after_the_context(subject: ShippedModel) -> None:
    question = Question("The operator", (" is", " was defined elsewhere"), 0)
    found = choices.likelihoods(subject.runner, subject.tokenizer, question)
    context = subject.tokenizer("The operator").input_ids
    for choice, score in zip(question.choices, found, strict=True):
        whole = subject.tokenizer("The operator" + choice).input_ids
        with torch.no_grad():
            said = torch.from_numpy(subject.runner.answer(np.array([whole])))[0].log_softmax(-1)
        expected = sum(said[at - 1, whole[at]].item() for at in range(len(context), len(whole)))
        assert score.item() == pytest.approx(expected, abs=0.05)


def test_a_choice_without_context_is_predicted_from_the_first_token(subject: ShippedModel) -> None:
    found = choices.likelihoods(subject.runner, subject.tokenizer, Question("", ("a", "b"), 0))
    with torch.no_grad():
        said = torch.from_numpy(subject.runner.answer(np.array([[1]])))[0, -1].log_softmax(-1)
    ids = [subject.tokenizer(letter).input_ids[0] for letter in "ab"]
    torch.testing.assert_close(found, said[ids], rtol=0.02, atol=0.02)


def test_choice_accuracy_counts_right_answers(subject: ShippedModel, tmp_path: Path) -> None:
    options = [" name", " statement list", " of"]
    item = {"context": "An expression", "choices": options, "answer": 0}
    scores = choices.likelihoods(
        subject.runner, subject.tokenizer, Question("An expression", tuple(options), 0)
    )
    best = int(scores.argmax())
    right, wrong = {**item, "answer": best}, {**item, "answer": (best + 1) % 3}
    found = choices.measure(questions(subject, tmp_path / "q.jsonl", right, right, right, wrong))
    assert found.metrics["choice_accuracy"] == 0.75
    assert found.errors["choice_accuracy"] == pytest.approx(0.25)


def test_the_normalised_choice_does_not_favour_short_ones(subject: ShippedModel, tmp_path: Path) -> None:
    # Of a random model every token is about equally unlikely, so fewer tokens win unless lengths count.
    item = {"context": "A", "choices": [" b", " the value of the expression and the statement"], "answer": 1}
    found = choices.measure(questions(subject, tmp_path / "q.jsonl", item))
    assert found.metrics == {"choice_accuracy": 0.0, "choice_accuracy_norm": 1.0}


def test_choices_without_items_are_refused_with_the_cure(subject: ShippedModel) -> None:
    with pytest.raises(ValueError, match=r"data\.choices"):
        choices.measure(subject)


def test_an_original_agrees_with_itself_and_less_with_a_damaged_model(
    encoder: ShippedModel, tmp_path: Path
) -> None:
    assert agreement.measure(encoder).metrics["agreement"] == pytest.approx(1.0, abs=1e-6)
    model = loading.load(encoder.original)
    del model.blocks[1]
    loading.save(model, tmp_path / "smaller", {})
    found = agreement.measure(dataclasses.replace(encoder, folder=tmp_path / "smaller"))
    assert found.metrics["agreement"] < 0.9999
    assert found.errors["agreement"] > 0


def test_the_original_is_read_once_and_again_only_where_it_has_changed(
    encoder: ShippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tmp_path / "original"
    shutil.copytree(encoder.original, original)
    subject, start, started = dataclasses.replace(encoder, original=original), on_torch.start, []
    expected = agreement.measure(subject)

    def counted(folder: Path, threads: int) -> on_torch.TorchRunner:
        started.append(folder)
        return start(folder, threads)

    monkeypatch.setattr(on_torch, "start", counted)
    again = dataclasses.replace(encoder, original=original)
    assert agreement.measure(again) == expected
    assert started == [encoder.folder]
    model = loading.load(encoder.original)
    del model.blocks[1]
    loading.save(model, original, {})
    changed = agreement.measure(dataclasses.replace(encoder, original=original))
    assert changed.metrics["agreement"] < 0.9999


def test_the_size_is_that_of_the_weight_files(subject: ShippedModel) -> None:
    expected = (subject.folder / "model.safetensors").stat().st_size
    assert size.measure(subject).metrics == {"size_bytes": float(expected)}


def classifier(tiny: Callable[..., Path], file: Path, *items: dict[str, object]) -> ShippedModel:
    folder = tiny("bert", "classification")
    file.write_text("\n".join(json.dumps(item) for item in items))
    return ShippedModel(folder, folder, Materials(str(folder), "classification", labelled=str(file)))


def test_a_classifiers_accuracy_is_the_share_of_texts_it_labels_right(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("bert", "classification")
    texts = ["An expression", "A list of names, and more", "if x: pass"]
    tokenizer, module = tokenizers.load_tokenizer(folder), loading.load(folder).module
    with torch.no_grad():
        said = [module(torch.tensor([tokenizer(one).input_ids])).logits.argmax().item() for one in texts]
    items = [{"text": one, "label": label} for one, label in zip(texts, said, strict=True)]
    perfect = labels.measure(classifier(tiny, tmp_path / "a.jsonl", *items)).metrics
    assert perfect == {"accuracy": 1.0, "f1": 1.0}
    items[0]["label"] = f"LABEL_{1 - said[0]}"  # a name that the config knows, and the wrong one
    found = labels.measure(classifier(tiny, tmp_path / "b.jsonl", *items))
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)


def macro_f1(said: list[int], right: list[int]) -> float:
    each = []
    for one in {*said, *right}:
        hits = sum(a == b == one for a, b in zip(said, right, strict=True))
        each.append(2 * hits / (said.count(one) + right.count(one)))
    return sum(each) / len(each)


def test_f1_is_that_of_counting_and_its_error_that_of_leaving_texts_out() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(3, (300,), generator=generator)
    said = torch.where(torch.rand(300, generator=generator) < 0.7, right, right * 0 + 1)
    found = labels.f1_items(said, right)
    whole = macro_f1(said.tolist(), right.tolist())
    assert found.mean().item() == pytest.approx(whole)
    without = []
    for at in range(300):
        kept = torch.arange(300) != at
        without.append(macro_f1(said[kept].tolist(), right[kept].tolist()))
    left_out = torch.tensor(without)
    jackknife = math.sqrt(299 / 300 * (left_out - left_out.mean()).square().sum().item())
    assert found.std().item() / math.sqrt(300) == pytest.approx(jackknife, rel=0.02)


def test_a_class_that_is_never_told_counts_as_zero() -> None:
    found = labels.f1_items(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    assert found.mean().item() == pytest.approx(6 / 7 / 2)


def test_a_label_that_the_model_does_not_know_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for label in (2, "joy"):
        with pytest.raises(
            ValueError, match=rf"x\.jsonl:1 label: got {label!r}, expected LABEL_0, LABEL_1 or 0 to 1"
        ):
            labels.measure(classifier(tiny, tmp_path / "x.jsonl", {"text": "An expression", "label": label}))
