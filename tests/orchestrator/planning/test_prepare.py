"""All problems of a study are reported at once with their lines, and no job is started."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.executors.executor import Resources
from jobs.job import Job
from jobs.measurement import energy_counters, machine
from jobs.parallel import Sharing
from jobs.prediction.latency_model import Table, amounts
from jobs.recipe import Recipe
from jobs.techniques.distill import Distill
from jobs.techniques.drop_layers import DropLayers
from orchestrator.config.load import load
from orchestrator.config.problems import InvalidStudyError
from orchestrator.planning.candidates import KnownMetrics, propose
from orchestrator.planning.cost import CostModel
from orchestrator.planning.initial_design import initial_design
from orchestrator.planning.job_resources import JobResources, share_of_gpu, sharing_of
from orchestrator.planning.prepare import prepare, with_table
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.study.budget import Budget


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(InvalidStudyError) as raised:
        prepare(load(file, overrides))
    return raised.value.lines


def test_a_valid_study_is_prepared(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    assert ready.plan.meters == ("size", "text")
    assert ready.plan.timers == ()
    assert ready.plan.original_cost.size_bytes == ready.layout.size_bytes()


def test_an_override_replaces_a_value_of_the_file(prepared: Callable[..., PreparedStudy]) -> None:
    assert prepared("search.candidates=3", "name=other").config.search.candidates == 3
    assert prepared("search.candidates=3").digest == prepared().digest
    assert prepared("search.seed=3").digest != prepared().digest


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.candidats=3", "command line search.candidats: got candidats, expected a known key: did you mean cand"),
        ("search.candidates=many", "command line search.candidates: got 'many', expected a whole number"),
        ("search.candidates=0", "command line search.candidates: got 0, expected at least 1"),
        ("search.algorithm=magic", "command line search.algorithm: got 'magic', expected one of gp, grid, nsga2"),
        ("task=poetry", "command line task: got 'poetry', expected one of causal-lm, classification, embedding"),
        ("target.threads=1000", "expected 1 to"),
        ("target.runtime=abacus", "got 'abacus', expected one of"),
        ("cluster.slots=true", "cluster.slots: got True, expected auto or a whole number"),
        ("cluster.gpus=[1]", "cluster.gpus: got [1], expected auto or a number"),
        ("cluster.slots=some", "got 'some', expected auto or a whole number from 1"),
        ("cluster.ranks=0", "cluster.ranks: got 0, expected auto or a whole number from 1"),
        ("cluster={slots: 2, ranks: 3}", "cluster.ranks: got 3, expected at most the 2 slots"),
        ("cluster.micro_batch=half", "cluster.micro_batch: got 'half', expected auto or a whole number from 1"),
        ("cluster.zero_stage=4", "cluster.zero_stage: got 4, expected auto or one of 0, 1, 2, 3"),
        ("cluster.device_gib=0", "cluster.device_gib: got 0, expected auto or more than 0"),
        ("objectives.accuracy.goal=up", "got 'up', expected min or max"),
        ("objectives.speed.goal=max", "objectives.speed: got nothing measures 'speed' for task causal-lm"),
        ("objectives.agreement.goal=max", "objectives.agreement: got nothing measures 'agreement' for task causal-lm"),
        ("objectives.choice_accuracy.goal=max", "data.choices: got nothing, expected a .jsonl of items"),
        ("objectives.task_score.goal=max", "data.tasks: got nothing, expected names of lm-eval's tasks"),
        ("data.tasks={folder: /nowhere, names: [a]}", "data.tasks: got /nowhere is not there"),
        ("data.tasks={names: [arc_easiest]}", "data.tasks: got lm-eval has no task 'arc_easiest'"),
        ("data.tasks={names: [arc_easy], items: 0}", "data.tasks: got items=0, expected at least 1"),
        ("name=a/b", "name: got 'a/b', expected letters, digits"),
        ("store=gs://bucket/x", "store: got there are no gs:// stores; give a folder or s3://bucket/prefix"),
        ("data.evaluation.tokens=100000000", "data.evaluation: got"),
        ("data.calibration.path=/nowhere.txt", "data.calibration: got"),
        ("data.evaluation.part=[0.9,0.1]", "data.evaluation: got part=[0.9, 0.1] must be a rising pair"),
        ("space.bits.rtn.bits=[3,5]", "space.bits.rtn.bits: got 5, expected a value in {2, 3, 4, 8}"),
        ("space.bits.rtn.bits=[]", "space.bits.rtn.bits: got an empty list, expected at least one value"),
        ("space.bits.rtn.bit=[3]", "space.bits.rtn.bit: got bit, expected an option of rtn, did you mean bits?"),
        ("space.bits.rtm={}", "space.bits.rtm: got rtm, expected a technique"),
        ("space.width.prune_ffn.ratio={low: 0.5, high: 0.2}", "got low=0.5 and high=0.2, expected low below high"),
        ("space.width.prune_ffn.ratio={low: 0.5}", "expected {low: …, high: …} within"),
        ("space.width.prune_ffn.ratio=1.5", "got 1.5, expected a value in [0, 0.9]"),
        ("search.table=some", "search.table: got 'some', expected auto or a whole number from 0"),
        ("target.price_per_hour=0", "target.price_per_hour: got 0.0, expected more than 0"),
        ("cluster.price_per_hour=-1", "cluster.price_per_hour: got -1.0, expected more than 0"),
        ("budget.money=0", "budget.money: got 0.0, expected more than 0"),
        ("budget.hours=.inf", "budget.hours: got inf, expected more than 0"),
        ("budget.hours=soon", "budget.hours: got 'soon', expected a number"),
        ("budget.money=20", "budget.money: got 20.0, expected cluster.price_per_hour with it: what an hour of this"),
        ("budget.euros=20", "budget.euros: got euros, expected a known key"),
        ("objectives={load_share: {goal: min}}", "load_share, which describes the machine and not a model"),
        ("objectives={cost_per_million_tokens: {goal: min}}", "the study has no target.price_per_hour"),
        ("space.later={distill: {steps: 3}}", "distill cannot follow rtn"),
    ],
)  # fmt: skip
def test_invalid_input_is_reported_with_its_key_its_value_and_the_expected_values(
    study_file: Path, override: str, expected: str
) -> None:
    lines = problems(study_file, override)
    assert any(expected in line for line in lines), lines


@pytest.mark.parametrize("override", ["cluster.price_per_hour=2", "cluster.address=auto"])
def test_a_money_budget_needs_a_price_or_a_cluster(
    prepared: Callable[..., PreparedStudy], override: str
) -> None:
    assert prepared("budget={money: 20, hours: 2}", override).budget == Budget(20, 2)


def test_a_budget_does_not_change_the_identity_of_a_study(prepared: Callable[..., PreparedStudy]) -> None:
    assert prepared().digest == prepared("budget.hours=2", "cluster.price_per_hour=3").digest


def test_all_problems_are_reported_at_once_with_their_lines(study_file: Path) -> None:
    text = (
        study_file.read_text().replace("bits: [3, 4, 8]", "bits: [3, 4, 9]").replace("goal: max", "goal: up")
    )
    study_file.write_text(text + "serch: {candidates: 5}\n")
    locations = {line.split(": ")[0] for line in problems(study_file)}
    line_numbers = {key: number for number, key in enumerate(text.splitlines(), 1)}
    accuracy = next(number for line, number in line_numbers.items() if "accuracy" in line)
    bits = next(number for line, number in line_numbers.items() if "rtn" in line)
    assert locations == {
        f"{study_file}:{accuracy} objectives.accuracy.goal",
        f"{study_file}:{bits} space.bits.rtn.bits",
        f"{study_file}:{len(line_numbers) + 1} serch",
    }


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n- 2\n", "a: 1\na: 2\n"])
def test_a_file_that_is_no_study_is_refused_without_a_traceback(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    assert all(line.startswith(str(file)) for line in problems(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "none.yaml")[0]


def test_a_model_folder_without_config_is_refused(study_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (line,) = problems(study_file, f"model={tmp_path / 'empty'}")
    assert "has no config.json" in line


def test_a_model_folder_with_pickled_weights_only_is_refused(study_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    (line,) = problems(study_file, f"model={folder}")
    assert "only pickled weights" in line


def test_a_model_with_custom_code_is_refused(study_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}))
    (line,) = problems(study_file, f"model={folder}")
    assert "auto_map" in line


def test_data_that_a_technique_needs_is_required(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text("\n".join(line for line in text.splitlines() if "calibration" not in line))
    (line,) = problems(study_file)
    assert "data.calibration: got nothing, expected a text: drop_layers, prune_ffn need it" in line


def test_the_known_size_of_choices_is_that_of_the_layout(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared()
    choices = {knob: domain.values[-1] for knob, domain in ready.space.knobs().items()}  # type: ignore[union-attr]
    recipe = ready.space.recipe(ready.plan.original.origin, choices)
    assert [step.name() for step in recipe.steps] == ["drop_layers", "prune_ffn", "rtn"]
    assert KnownMetrics(ready, CostModel.of(ready))(choices) == {
        "size_bytes": recipe.layout(ready.layout).size_bytes()
    }


def test_energy_is_refused_where_the_machine_has_no_counter(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_counters, "counters", lambda *_: [])
    (line,) = problems(study_file, "objectives.token_joules={goal: min}")
    assert "objectives.token_joules: got token_joules, which cannot be measured here: " in line
    assert "no energy counter" in line


def test_one_timing_measures_all_metrics_that_it_can(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_counters, "counters", lambda *_: [])
    memory = ["memory"] if machine.peak_memory_bytes() else []
    assert prepared("objectives.decode_ms={goal: min}").plan.timers == ("latency", *memory)
    priced = prepared("objectives.decode_ms={goal: min}", "target.price_per_hour=0.1").plan
    assert priced.timers == ("cost", "latency", *memory)
    assert priced.timed == {"decode_ms"}


def test_tasks_are_measured_whenever_the_study_has_them(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("data.tasks={names: [arc_easy, 'hellaswag:acc_norm'], items: 20}")
    assert ready.plan.meters == ("lm_eval_tasks", "size", "text")
    fewer = prepared("data.tasks={names: [arc_easy], items: 20}")
    assert fewer.plan.materials_digest != ready.plan.materials_digest


def test_a_table_predicts_the_latency_of_proposals(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("objectives.decode_ms={goal: min}")
    choices = {knob: domain.values[-1] for knob, domain in ready.space.knobs().items()}  # type: ignore[union-attr]
    plain_cost = propose(ready, CostModel.of(ready), choices).cost
    units = dict.fromkeys([*amounts(ready.layout), "linear packed 8", "weights packed 8 group 64"], 1.0)
    with_predictions = with_table(ready, Table({"decode_ms": units}, {"decode_ms": 0.05}))
    assert plain_cost is not None
    assert plain_cost.predicted == {}
    predicted_cost = propose(with_predictions, CostModel.of(with_predictions), choices).cost
    assert predicted_cost is not None
    assert predicted_cost.predicted["decode_ms"] < with_predictions.plan.original_cost.predicted["decode_ms"]
    assert with_predictions.plan.prediction_errors == {"decode_ms": 0.05}
    incomplete = with_table(ready, Table({"decode_ms": dict.fromkeys(amounts(ready.layout), 1.0)}, {}))
    assert propose(incomplete, CostModel.of(incomplete), choices).cost == plain_cost


def test_a_tokenizer_of_another_model_is_refused(study_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (line,) = problems(study_file, f"model={folder}")
    assert "makes ids up to 511, and the embedding has 300 rows" in line


def test_a_classifier_needs_texts_with_labels(study_file: Path, tiny: Callable[..., Path]) -> None:
    lines = problems(study_file, f"model={tiny('bert', 'classification')}", "task=classification")
    assert [line for line in lines if "data.labelled: got nothing" in line]


def test_the_surrogate_starts_with_the_weakest_and_strongest_setting_of_each_technique(
    prepared: Callable[..., PreparedStudy],
) -> None:
    def initial_recipes(*overrides: str) -> list[tuple[str, float]]:
        ready = prepared("search.candidates=40", "search.algorithm=surrogate", *overrides)
        costs = CostModel.of(ready)
        known_metrics = KnownMetrics(ready, costs)
        design = initial_design(ready, known_metrics)
        sizes = [known_metrics(choices)["size_bytes"] for choices in design]
        recipes = [str(propose(ready, costs, choices).recipe) for choices in design]
        return list(zip(recipes, sizes, strict=True))

    sizes_by_recipe = dict(initial_recipes())
    weakest, strongest = list(sizes_by_recipe)[:3], list(sizes_by_recipe)[3:]
    assert set(weakest) == {"rtn(bits=8, group=32)", "drop_layers(count=1)", "prune_ffn(ratio=0.2)"}
    assert set(strongest) == {"rtn(bits=3)", "drop_layers(count=2)", "prune_ffn(ratio=0.4)"}
    assert [sizes_by_recipe[recipe] for recipe in weakest] == sorted(
        sizes_by_recipe[recipe] for recipe in weakest
    )
    assert initial_recipes("search.candidates=8") == initial_recipes()[:2]
    assert initial_recipes("search.algorithm=random") == []
    assert dict(initial_recipes(f"objectives.size_bytes.limit={sizes_by_recipe['rtn(bits=3)']}")).keys() == {
        "rtn(bits=3)"
    }


def test_all_blocks_have_equal_values_in_the_initial_design(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(
        text.replace("bits: [3, 4, 8]", "bits: {choices: [3, 4, 8], each: layer, groups: 2}")
    )
    ready = prepare(load(study_file, ["search.candidates=40", "search.algorithm=surrogate"]))
    costs = CostModel.of(ready)
    design = initial_design(ready, KnownMetrics(ready, costs))
    recipes = {str(propose(ready, costs, choices).recipe) for choices in design}
    assert {"rtn(bits=8, group=32)", "rtn(bits=3)"} < recipes


def with_space(file: Path, space: str) -> Path:
    """Write a copy of the study file with this space and return its path."""
    text = file.read_text()
    space_start, search_start = text.index("space:"), text.index("search:")
    copy = file.with_name("other.yaml")
    copy.write_text(f"{text[:space_start]}space: {{{space}}}\n{text[search_start:]}")
    return copy


def test_a_zero_stage_that_some_techniques_do_not_support_is_refused(study_file: Path) -> None:
    def problems_of_space(space: str) -> list[str]:
        return problems(with_space(study_file, space), "cluster.zero_stage=3")

    (aware,) = problems_of_space("rank: {anneal_rank: {}}, sparse: {gradual_prune: {}}")
    assert "cluster.zero_stage: got 3, expected auto or at most 2: anneal_rank, gradual_prune read" in aware
    (sparse,) = problems_of_space("sparse: {magnitude: {}}, recover: {distill: {steps: [0, 3]}}")
    assert "at most 2: distill read" in sparse
    dense = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    assert prepare(load(dense, ("cluster.zero_stage=3",)))


def test_only_trainings_use_several_ranks_and_by_default_no_more_than_necessary(
    study_file: Path,
) -> None:
    file = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    ready = prepare(load(file, ("cluster.slots=4",)))
    origin = ready.plan.original.origin
    dropped, distilled = (Recipe(origin, steps) for steps in ((DropLayers(1),), (DropLayers(1), Distill())))
    train = Job(distilled, ("size", "text"), "materials")
    assert JobResources.for_study(ready).ranks(train, 4) == 1
    with_ranks = prepare(load(file, ("cluster={slots: 4, ranks: 3}",)))
    assert JobResources.for_study(with_ranks).ranks(train, 4) == 3
    assert JobResources.for_study(with_ranks).ranks(Job(dropped, ("size",), "materials"), 4) == 1
    assert JobResources.for_study(with_ranks).ranks(Job(ready.plan.original, ("size",), "materials"), 4) == 1
    # The model of this job exists already.
    assert (
        JobResources.for_study(with_ranks).ranks(dataclasses.replace(train, fidelity=1.0, after=0.5), 4) == 1
    )
    # This device holds all of the training except a part of the optimizer's states.
    single_rank_gib = JobResources.for_study(ready).memory_gib(train)
    tight = prepare(load(file, (f"cluster={{slots: 4, device_gib: {single_rank_gib - 0.001}}}",)))
    assert JobResources.for_study(tight).ranks(train, 4) == 2
    assert JobResources.for_study(tight).memory_gib(train, 2) < single_rank_gib


def test_the_distribution_of_trainings_does_not_change_the_identity_of_a_study(study_file: Path) -> None:
    file = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    cluster = "cluster={slots: 2, ranks: 2, zero_stage: 3, micro_batch: 2, device_gib: 80}"
    spread = prepare(load(file, (cluster,)))
    assert spread.digest == prepare(load(file)).digest
    assert sharing_of(spread.config.cluster) == Sharing(zero_stage=3, micro_batch=2, device_gib=80)


def test_the_study_determines_the_resources_of_a_job(prepared: Callable[..., PreparedStudy]) -> None:
    cluster_options = ["cluster.timing={target: laptop}", "cluster.gpus=2"]
    timing_options = ["objectives={size_bytes: {goal: min}, prefill_ms: {goal: min}}", "target.threads=1"]
    ready = prepared(*cluster_options, *timing_options, "cluster.address=auto")
    job, timing = (Job(ready.plan.original, meters, "") for meters in (("size",), ready.plan.timers))
    memory_gib = JobResources.for_study(ready).memory_gib(job)
    assert JobResources.for_study(ready).of(job, False, 4) == Resources(gpus=2, memory_gib=memory_gib)
    # This is a retry with exclusive access after an out-of-memory error.
    assert JobResources.for_study(ready).of(job, True, 4) == Resources(
        gpus=2, memory_gib=memory_gib, exclusive=True
    )
    on_laptop = Resources(memory_gib=memory_gib, exclusive=True, labels={"target": "laptop"})
    assert JobResources.for_study(ready).of(timing, True, 4) == on_laptop
    local = prepared(cluster_options[0], *timing_options)
    assert JobResources.for_study(local).of(timing, True, 4) == Resources(
        memory_gib=memory_gib, exclusive=True
    )


def test_the_number_of_jobs_per_gpu_follows_its_memory(
    prepared: Callable[..., PreparedStudy], study_file: Path
) -> None:
    assert [share_of_gpu(memory_gib, 24.0) for memory_gib in (24.0, 12.1, 12.0, 7.0, 40.0)] == [
        1,
        1,
        0.5,
        0.3333,
        1,
    ]
    assert all(jobs * share_of_gpu(24.0 / jobs, 24.0) <= 1 for jobs in range(1, 40))
    ready = prepared("cluster.address=auto", "cluster.gpus=auto", "cluster.device_gib=2")
    job = Job(ready.plan.original, (), "")
    resources = JobResources.for_study(ready)
    assert resources.of(job, False, 4).gpus == share_of_gpu(resources.memory_gib(job), 2.0) < 1
    (line,) = problems(study_file, "cluster.gpus=auto")
    assert line.endswith("cluster.gpus: got 'auto', expected cluster.device_gib with it")


def test_the_head_of_a_cluster_need_not_have_the_targets_cores(study_file: Path) -> None:
    (line,) = problems(study_file, "target.threads=4096")
    assert "the cores of this machine" in line
    assert prepare(load(study_file, ("target.threads=4096", "cluster.address=auto")))
