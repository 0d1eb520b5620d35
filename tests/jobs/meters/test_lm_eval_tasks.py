"""The lm-eval tasks on a compressed artifact: scores equal those of lm-eval itself, and errors those of a study."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.materials import Materials, TaskSource, materials_from_dict
from jobs.measurement.meter import ShippedModel
from jobs.meters import choices, lm_eval_tasks
from jobs.models import loading, tokenizers
from jobs.runtimes import on_torch

pytest.importorskip("lm_eval", reason="the extra `tasks`")

ANSWERS = {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{wanted}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {"name": "letters", "filter": [{"function": "regex", "regex_pattern": "[a-z]+"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
TEXTS = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None, "doc_to_target": "{{context}}",
    "metric_list": [{"metric": "word_perplexity"}],
}  # fmt: skip
CONTEXTS = ("An expression", "The operator is", "A statement of", "Names in the block", "Classes may")
ITEMS = [
    {
        "context": context,
        "choices": [" list", " of names and values", " was"],
        "answer": index % 3,
        "wanted": "x",
    }
    for index, context in enumerate(CONTEXTS)
]


@pytest.fixture(scope="module")
def folder(lm_eval_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write user-defined tasks: `many` has five questions, `few` two, `both` groups them; two are of other kinds."""
    tasks_folder = tmp_path_factory.mktemp("tasks")
    lm_eval_task(tasks_folder, "many", ITEMS)
    lm_eval_task(tasks_folder, "few", ITEMS[:2])
    lm_eval_task(tasks_folder, "answers", ITEMS[:3], **ANSWERS)
    lm_eval_task(tasks_folder, "texts", ITEMS[:2], **TEXTS)
    (tasks_folder / "both.yaml").write_text(
        "group: both\ntask: [many, few]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    return tasks_folder


def subject(model: Path, folder: Path, *names: str, **options: Any) -> ShippedModel:
    tasks = TaskSource(names, str(folder), **options)
    return ShippedModel(model, model, Materials(str(model), "causal-lm", tasks=tasks))


def test_multiple_choice_scores_equal_those_of_the_choices_meter(tiny_llama: Path, folder: Path) -> None:
    model = subject(tiny_llama, folder, "many")
    materials = Materials(str(tiny_llama), "causal-lm", choices=str(folder / "many.jsonl"))
    expected = choices.measure(ShippedModel(tiny_llama, tiny_llama, materials))
    measurement = lm_eval_tasks.measure(model)
    assert measurement.metrics["task_score"] == pytest.approx(expected.metrics["choice_accuracy"])
    assert measurement.errors["task_score"] == pytest.approx(expected.errors["choice_accuracy"])
    normalised = lm_eval_tasks.measure(subject(tiny_llama, folder, "many:acc_norm"))
    assert normalised.metrics["task_score"] == pytest.approx(expected.metrics["choice_accuracy_norm"])


def test_likelihoods_and_answers_equal_those_of_lm_eval_with_transformers(
    tiny_llama: Path, folder: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = tokenizers.load_tokenizer(tiny_llama), loading.load(tiny_llama)
    module: Any = model.module.float()
    reference: Any = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=1)
    adapter = lm_eval_tasks._adapter(on_torch.TorchRunner(model), tokenizer, 64)
    pairs = [(item["context"], ending) for item in ITEMS for ending in item["choices"]] + [("", " list")]  # type: ignore[attr-defined]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    answers = adapter.loglikelihood(requests, disable_tqdm=True)
    expected_answers = reference.loglikelihood(requests, disable_tqdm=True)
    for (score, greedy), (expected_score, expected_greedy) in zip(answers, expected_answers, strict=True):
        assert score == pytest.approx(expected_score, abs=1e-3)
        assert greedy == expected_greedy
    texts = [SimpleNamespace(args=(context, {"until": ["\n\n"], "max_gen_toks": 8})) for context in CONTEXTS]
    assert adapter.generate_until(texts) == reference.generate_until(texts, disable_tqdm=True)


def test_each_name_has_equal_weight_and_a_group_is_the_mean_of_its_tasks(
    tiny_llama: Path, folder: Path
) -> None:
    def score(*names: str) -> float:
        return lm_eval_tasks.measure(subject(tiny_llama, folder, *names)).metrics["task_score"]

    many, few, answers = score("many"), score("few"), score("answers")
    assert score("both") == pytest.approx((many + few) / 2)
    assert score("both", "answers") == pytest.approx(((many + few) / 2 + answers) / 2)


def test_the_score_is_that_of_the_first_filter() -> None:
    results = {
        "t": {"alias": "t", "em,strict": 0.5, "em_stderr,strict": 0.1, "em,loose": 1.0, "f,loose": 0.0}
    }
    samples = [{"filter": "strict", "em": value} for value in (0.0, 1.0)]
    samples += [{"filter": "loose", "em": 1.0, "f": 0.0}] * 2
    output = {"results": results, "samples": {"t": samples}}
    assert lm_eval_tasks._items(output, "t", None) == [0.0, 1.0]
    assert lm_eval_tasks._items(output, "t", "f") == [0.0, 0.0]


def test_the_standard_error_is_that_of_a_mean_of_independent_tasks() -> None:
    first, second = [0.0, 1.0, 1.0, 1.0], [0.0, 1.0]
    items = lm_eval_tasks.weighted([{"first": first}, {"second": second}])
    assert sum(items) / 6 == pytest.approx((0.75 + 0.5) / 2)
    spread = math.sqrt(sum((item - 0.625) ** 2 for item in items)) / 6
    # Each task's variance over its number of items is added; the mean over two tasks halves the root.
    assert spread == pytest.approx(math.sqrt(0.1875 / 4 + 0.25 / 2) / 2)


def test_the_number_of_items_can_be_limited(tiny_llama: Path, folder: Path) -> None:
    measurement = lm_eval_tasks.measure(subject(tiny_llama, folder, "many", items=4))
    assert len(measurement.items["task_score"]) == 4
    half = dataclasses.replace(subject(tiny_llama, folder, "many", items=4), fidelity=0.5)
    assert len(lm_eval_tasks.measure(half).items["task_score"]) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("many:f1",), r"many has no metric f1 \(it has: acc, acc_norm\)"),
        (("texts",), "perplexity is not available as a task"),
    ],
)
def test_a_metric_that_is_no_mean_over_items_is_refused(
    tiny_llama: Path, folder: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lm_eval_tasks.measure(subject(tiny_llama, folder, *names))


def test_tasks_are_checked_before_execution(folder: Path, tmp_path: Path) -> None:
    lm_eval_tasks.check(TaskSource(("many", "both", "few:acc_norm", "arc_easy"), str(folder)))
    with pytest.raises(ValueError, match="no task 'lots'"):
        lm_eval_tasks.check(TaskSource(("lots",), str(folder)))
    with pytest.raises(ValueError, match="names is empty"):
        lm_eval_tasks.check(TaskSource((), str(folder)))
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        lm_eval_tasks.check(TaskSource(("many",), str(tmp_path / "nowhere")))


def test_the_digest_depends_on_the_tasks_and_their_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    source = TaskSource(("many",), str(copy))
    original_digest = lm_eval_tasks.digest(source)
    assert lm_eval_tasks.digest(dataclasses.replace(source, shots=1)) != original_digest
    (copy / "many.jsonl").write_text(json.dumps(ITEMS[0]))
    assert lm_eval_tasks.digest(source) != original_digest


def test_a_task_that_samples_is_refused(tiny_llama: Path, folder: Path) -> None:
    model = subject(tiny_llama, folder, "answers")
    with pytest.raises(ValueError, match="samples its answers"):
        lm_eval_tasks._generate(
            model.runner, model.tokenizer, 64, "An", {"do_sample": True, "temperature": 0.7}
        )


def test_materials_are_restored_from_a_record_with_their_tasks() -> None:
    tasks = TaskSource(("many", "few:acc_norm"), "tasks", 3, 1)
    for materials in (Materials("model", "causal-lm", tasks=tasks), Materials("model", "causal-lm")):
        record = json.loads(json.dumps(dataclasses.asdict(materials)))
        assert materials_from_dict(record) == materials
    earlier = {name: value for name, value in record.items() if name != "tasks"}
    assert materials_from_dict(earlier) == materials
