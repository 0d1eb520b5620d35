"""lm-eval's tasks on what is shipped: as lm-eval itself scores the model, and as a study counts it."""

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
    {"context": one, "choices": [" list", " of names and values", " was"], "answer": at % 3, "wanted": "x"}
    for at, one in enumerate(CONTEXTS)
]


@pytest.fixture(scope="module")
def folder(lm_eval_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own: `many` of five questions, `few` of two, the group of both, and two of other kinds."""
    made = tmp_path_factory.mktemp("tasks")
    lm_eval_task(made, "many", ITEMS)
    lm_eval_task(made, "few", ITEMS[:2])
    lm_eval_task(made, "answers", ITEMS[:3], **ANSWERS)
    lm_eval_task(made, "texts", ITEMS[:2], **TEXTS)
    (made / "both.yaml").write_text(
        "group: both\ntask: [many, few]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    return made


def subject(model: Path, folder: Path, *names: str, **options: Any) -> ShippedModel:
    tasks = TaskSource(names, str(folder), **options)
    return ShippedModel(model, model, Materials(str(model), "causal-lm", tasks=tasks))


def test_questions_score_as_the_meter_of_choices_scores_them(tiny_llama: Path, folder: Path) -> None:
    asked = subject(tiny_llama, folder, "many")
    materials = Materials(str(tiny_llama), "causal-lm", choices=str(folder / "many.jsonl"))
    ours = choices.measure(ShippedModel(tiny_llama, tiny_llama, materials))
    found = lm_eval_tasks.measure(asked)
    assert found.metrics["task_score"] == pytest.approx(ours.metrics["choice_accuracy"])
    assert found.errors["task_score"] == pytest.approx(ours.errors["choice_accuracy"])
    normalised = lm_eval_tasks.measure(subject(tiny_llama, folder, "many:acc_norm"))
    assert normalised.metrics["task_score"] == pytest.approx(ours.metrics["choice_accuracy_norm"])


def test_a_model_answers_as_lm_eval_has_transformers_answer(tiny_llama: Path, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    words, model = tokenizers.load_tokenizer(tiny_llama), loading.load(tiny_llama)
    module: Any = model.module.float()
    theirs: Any = HFLM(pretrained=module, tokenizer=words, batch_size=1)
    ours = lm_eval_tasks._adapter(on_torch.TorchRunner(model), words, 64)
    pairs = [(item["context"], ending) for item in ITEMS for ending in item["choices"]] + [("", " list")]  # type: ignore[attr-defined]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    told = ours.loglikelihood(requests, disable_tqdm=True)
    for (mine, greedy), (score, same) in zip(
        told, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine == pytest.approx(score, abs=1e-3)
        assert greedy == same
    texts = [SimpleNamespace(args=(one, {"until": ["\n\n"], "max_gen_toks": 8})) for one in CONTEXTS]
    assert ours.generate_until(texts) == theirs.generate_until(texts, disable_tqdm=True)


def test_each_name_counts_alike_and_a_group_is_the_mean_of_its_tasks(tiny_llama: Path, folder: Path) -> None:
    def score(*names: str) -> float:
        return lm_eval_tasks.measure(subject(tiny_llama, folder, *names)).metrics["task_score"]

    many, few, answers = score("many"), score("few"), score("answers")
    assert score("both") == pytest.approx((many + few) / 2)
    assert score("both", "answers") == pytest.approx(((many + few) / 2 + answers) / 2)


def test_of_several_filters_the_first_counts() -> None:
    results = {
        "t": {"alias": "t", "em,strict": 0.5, "em_stderr,strict": 0.1, "em,loose": 1.0, "f,loose": 0.0}
    }
    samples = [{"filter": "strict", "em": value} for value in (0.0, 1.0)]
    samples += [{"filter": "loose", "em": 1.0, "f": 0.0}] * 2
    found = {"results": results, "samples": {"t": samples}}
    assert lm_eval_tasks._items(found, "t", None) == [0.0, 1.0]
    assert lm_eval_tasks._items(found, "t", "f") == [0.0, 0.0]


def test_the_error_is_that_of_a_mean_of_independent_tasks() -> None:
    first, second = [0.0, 1.0, 1.0, 1.0], [0.0, 1.0]
    items = lm_eval_tasks.weighted([{"first": first}, {"second": second}])
    assert sum(items) / 6 == pytest.approx((0.75 + 0.5) / 2)
    spread = math.sqrt(sum((item - 0.625) ** 2 for item in items)) / 6
    assert spread == pytest.approx(
        math.sqrt(0.1875 / 4 + 0.25 / 2) / 2
    )  # of variances over n, halved as the mean is


def test_fewer_items_are_read_where_asked(tiny_llama: Path, folder: Path) -> None:
    found = lm_eval_tasks.measure(subject(tiny_llama, folder, "many", items=4))
    assert len(found.items["task_score"]) == 4
    half = dataclasses.replace(subject(tiny_llama, folder, "many", items=4), fidelity=0.5)
    assert len(lm_eval_tasks.measure(half).items["task_score"]) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("many:f1",), r"many has no metric f1 \(it has: acc, acc_norm\)"),
        (("texts",), "perplexity is not available as a task"),
    ],
)
def test_what_is_no_mean_over_items_is_refused(
    tiny_llama: Path, folder: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lm_eval_tasks.measure(subject(tiny_llama, folder, *names))


def test_tasks_are_checked_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    lm_eval_tasks.check(TaskSource(("many", "both", "few:acc_norm", "arc_easy"), str(folder)))
    with pytest.raises(ValueError, match="no task 'lots'"):
        lm_eval_tasks.check(TaskSource(("lots",), str(folder)))
    with pytest.raises(ValueError, match="names is empty"):
        lm_eval_tasks.check(TaskSource((), str(folder)))
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        lm_eval_tasks.check(TaskSource(("many",), str(tmp_path / "nowhere")))


def test_the_digest_follows_the_tasks_and_their_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    source = TaskSource(("many",), str(copy))
    before = lm_eval_tasks.digest(source)
    assert lm_eval_tasks.digest(dataclasses.replace(source, shots=1)) != before
    (copy / "many.jsonl").write_text(json.dumps(ITEMS[0]))
    assert lm_eval_tasks.digest(source) != before


def test_a_task_that_samples_is_refused(tiny_llama: Path, folder: Path) -> None:
    asked = subject(tiny_llama, folder, "answers")
    with pytest.raises(ValueError, match="samples its answers"):
        lm_eval_tasks._generate(
            asked.runner, asked.tokenizer, 64, "An", {"do_sample": True, "temperature": 0.7}
        )


def test_materials_come_back_from_a_record_with_their_tasks() -> None:
    tasks = TaskSource(("many", "few:acc_norm"), "tasks", 3, 1)
    for materials in (Materials("model", "causal-lm", tasks=tasks), Materials("model", "causal-lm")):
        record = json.loads(json.dumps(dataclasses.asdict(materials)))
        assert materials_from_dict(record) == materials
    earlier = {name: value for name, value in record.items() if name != "tasks"}
    assert materials_from_dict(earlier) == materials
