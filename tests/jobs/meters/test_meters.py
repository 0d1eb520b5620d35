"""Every meter's numbers are checked against slow, obvious implementations and cases worked by hand."""

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
    """A model of ten tokens that predicts with near certainty the current token plus 1."""

    def answer(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return 50.0 * np.eye(10, dtype=np.float32)[(rows + 1) % 10]


def test_perplexity_and_accuracy_equal_those_of_an_obvious_loop(subject: ShippedModel) -> None:
    rows = subject.evaluation()
    losses, hits = [], []
    with torch.no_grad():
        for row in rows:
            log_probabilities = torch.from_numpy(subject.runner.answer(row[None].numpy()))[0].log_softmax(-1)
            for position in range(len(row) - 1):
                losses.append(-log_probabilities[position, row[position + 1]].item())
                hits.append(log_probabilities[position].argmax().item() == row[position + 1].item())
    measurement = text.measure(subject)
    assert measurement.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert measurement.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_a_certain_and_correct_model_has_perplexity_1() -> None:
    loss, hits = text.score(Certain(), torch.arange(20).view(2, 10) % 10)
    assert loss.exp().tolist() == pytest.approx([1.0, 1.0])
    assert hits.tolist() == [1.0, 1.0]


def test_standard_errors_on_text_are_clustered_by_window(subject: ShippedModel) -> None:
    losses, hits = text.score(subject.runner, subject.evaluation())
    measurement = text.measure(subject)
    assert measurement.errors["accuracy"] == pytest.approx(hits.std().item() / math.sqrt(6), rel=1e-3)
    clustered = losses.mean().exp().item() * losses.std().item() / math.sqrt(6)
    assert measurement.errors["perplexity"] == pytest.approx(clustered, rel=1e-2)


def test_a_lower_fidelity_reads_only_the_first_windows(subject: ShippedModel) -> None:
    half = dataclasses.replace(subject, fidelity=0.5)
    assert torch.equal(half.evaluation(), subject.evaluation()[:3])
    assert len(dataclasses.replace(subject, fidelity=0.01).evaluation()) == 1


def test_a_model_with_nan_outputs_is_refused(subject: ShippedModel, tmp_path: Path) -> None:
    model = loading.load(subject.original)
    next(model.blocks.parameters()).fill_(math.nan)
    loading.save(model, tmp_path / "broken", {})
    with pytest.raises(FloatingPointError, match="perplexity"):
        text.measure(dataclasses.replace(subject, folder=tmp_path / "broken"))


def test_the_standard_error_is_the_deviation_over_the_root_of_the_count() -> None:
    measurement = run_meter({"four": torch.tensor([1.0, 2.0, 3.0, 4.0]), "one": torch.tensor([3.0])})
    assert measurement.metrics == {"four": 2.5, "one": 3.0}
    assert measurement.errors == {"four": pytest.approx(0.6454972), "one": 0.0}
    assert measurement.items == {"four": [1.0, 2.0, 3.0, 4.0], "one": [3.0]}


def test_the_likelihood_of_a_choice_is_that_of_its_tokens_after_the_context(subject: ShippedModel) -> None:
    question = Question("The operator", (" is", " was defined elsewhere"), 0)
    scores = choices.likelihoods(subject.runner, subject.tokenizer, question)
    context = subject.tokenizer("The operator").input_ids
    for choice, score in zip(question.choices, scores, strict=True):
        token_ids = subject.tokenizer("The operator" + choice).input_ids
        with torch.no_grad():
            log_probabilities = torch.from_numpy(subject.runner.answer(np.array([token_ids])))[0].log_softmax(
                -1
            )
        expected = sum(
            log_probabilities[position - 1, token_ids[position]].item()
            for position in range(len(context), len(token_ids))
        )
        assert score.item() == pytest.approx(expected, abs=0.05)


def test_a_choice_without_context_is_predicted_from_the_first_token(subject: ShippedModel) -> None:
    scores = choices.likelihoods(subject.runner, subject.tokenizer, Question("", ("a", "b"), 0))
    with torch.no_grad():
        log_probabilities = torch.from_numpy(subject.runner.answer(np.array([[1]])))[0, -1].log_softmax(-1)
    ids = [subject.tokenizer(letter).input_ids[0] for letter in "ab"]
    torch.testing.assert_close(scores, log_probabilities[ids], rtol=0.02, atol=0.02)


def test_choice_accuracy_is_the_share_of_correct_answers(subject: ShippedModel, tmp_path: Path) -> None:
    options = [" name", " statement list", " of"]
    item = {"context": "An expression", "choices": options, "answer": 0}
    scores = choices.likelihoods(
        subject.runner, subject.tokenizer, Question("An expression", tuple(options), 0)
    )
    best = int(scores.argmax())
    right, wrong = {**item, "answer": best}, {**item, "answer": (best + 1) % 3}
    measurement = choices.measure(questions(subject, tmp_path / "q.jsonl", right, right, right, wrong))
    assert measurement.metrics["choice_accuracy"] == 0.75
    assert measurement.errors["choice_accuracy"] == pytest.approx(0.25)


def test_the_normalised_accuracy_does_not_favour_short_choices(subject: ShippedModel, tmp_path: Path) -> None:
    # A random model finds all tokens about equally unlikely, so the shorter choice wins unless normalised.
    item = {"context": "A", "choices": [" b", " the value of the expression and the statement"], "answer": 1}
    measurement = choices.measure(questions(subject, tmp_path / "q.jsonl", item))
    assert measurement.metrics == {"choice_accuracy": 0.0, "choice_accuracy_norm": 1.0}


def test_measuring_choices_without_items_is_refused_with_the_option_to_set(subject: ShippedModel) -> None:
    with pytest.raises(ValueError, match=r"data\.choices"):
        choices.measure(subject)


def test_an_original_agrees_with_itself_and_less_with_a_damaged_model(
    encoder: ShippedModel, tmp_path: Path
) -> None:
    assert agreement.measure(encoder).metrics["agreement"] == pytest.approx(1.0, abs=1e-6)
    model = loading.load(encoder.original)
    del model.blocks[1]
    loading.save(model, tmp_path / "smaller", {})
    measurement = agreement.measure(dataclasses.replace(encoder, folder=tmp_path / "smaller"))
    assert measurement.metrics["agreement"] < 0.9999
    assert measurement.errors["agreement"] > 0


def test_the_original_is_read_once_until_it_changes(
    encoder: ShippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tmp_path / "original"
    shutil.copytree(encoder.original, original)
    subject, start, loaded_folders = dataclasses.replace(encoder, original=original), on_torch.start, []
    expected = agreement.measure(subject)

    def counted_start(folder: Path, threads: int) -> on_torch.TorchRunner:
        loaded_folders.append(folder)
        return start(folder, threads)

    monkeypatch.setattr(on_torch, "start", counted_start)
    same_subject = dataclasses.replace(encoder, original=original)
    assert agreement.measure(same_subject) == expected
    assert loaded_folders == [encoder.folder]
    model = loading.load(encoder.original)
    del model.blocks[1]
    loading.save(model, original, {})
    changed = agreement.measure(dataclasses.replace(encoder, original=original))
    assert changed.metrics["agreement"] < 0.9999


def test_the_size_equals_that_of_the_weight_files(subject: ShippedModel) -> None:
    expected = (subject.folder / "model.safetensors").stat().st_size
    assert size.measure(subject).metrics == {"size_bytes": float(expected)}


def classifier(tiny: Callable[..., Path], file: Path, *items: dict[str, object]) -> ShippedModel:
    folder = tiny("bert", "classification")
    file.write_text("\n".join(json.dumps(item) for item in items))
    return ShippedModel(folder, folder, Materials(str(folder), "classification", labelled=str(file)))


def test_a_classifiers_accuracy_is_the_share_of_correctly_labelled_texts(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("bert", "classification")
    texts = ["An expression", "A list of names, and more", "if x: pass"]
    tokenizer, module = tokenizers.load_tokenizer(folder), loading.load(folder).module
    with torch.no_grad():
        predictions = [
            module(torch.tensor([tokenizer(sample).input_ids])).logits.argmax().item() for sample in texts
        ]
    items = [{"text": sample, "label": label} for sample, label in zip(texts, predictions, strict=True)]
    perfect = labels.measure(classifier(tiny, tmp_path / "a.jsonl", *items)).metrics
    assert perfect == {"accuracy": 1.0, "f1": 1.0}
    items[0]["label"] = f"LABEL_{1 - predictions[0]}"  # a name from the config, of the wrong class
    measurement = labels.measure(classifier(tiny, tmp_path / "b.jsonl", *items))
    assert measurement.metrics["accuracy"] == pytest.approx(2 / 3)


def macro_f1(predicted: list[int], right: list[int]) -> float:
    scores = []
    for label in {*predicted, *right}:
        hits = sum(a == b == label for a, b in zip(predicted, right, strict=True))
        scores.append(2 * hits / (predicted.count(label) + right.count(label)))
    return sum(scores) / len(scores)


def test_f1_equals_the_counted_one_and_its_error_that_of_the_jackknife() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(3, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.7, right, right * 0 + 1)
    items = labels.f1_items(predicted, right)
    exact = macro_f1(predicted.tolist(), right.tolist())
    assert items.mean().item() == pytest.approx(exact)
    scores = []
    for omitted in range(300):
        included = torch.arange(300) != omitted
        scores.append(macro_f1(predicted[included].tolist(), right[included].tolist()))
    leave_one_out = torch.tensor(scores)
    jackknife = math.sqrt(299 / 300 * (leave_one_out - leave_one_out.mean()).square().sum().item())
    assert items.std().item() / math.sqrt(300) == pytest.approx(jackknife, rel=0.02)


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    items = labels.f1_items(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    assert items.mean().item() == pytest.approx(6 / 7 / 2)


def test_an_unknown_label_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for label in (2, "joy"):
        with pytest.raises(
            ValueError, match=rf"x\.jsonl:1 label: got {label!r}, expected LABEL_0, LABEL_1 or 0 to 1"
        ):
            labels.measure(classifier(tiny, tmp_path / "x.jsonl", {"text": "An expression", "label": label}))
