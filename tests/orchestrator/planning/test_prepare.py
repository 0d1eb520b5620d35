"""What is wrong with a study is told at once, each with its place, and nothing is started."""

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


def test_an_override_replaces_what_the_file_says(prepared: Callable[..., PreparedStudy]) -> None:
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
def test_bad_input_is_told_with_its_key_what_was_got_and_what_was_expected(
    study_file: Path, override: str, expected: str
) -> None:
    lines = problems(study_file, override)
    assert any(expected in line for line in lines), lines


@pytest.mark.parametrize("given", ["cluster.price_per_hour=2", "cluster.address=auto"])
def test_money_needs_a_price_of_this_machine_or_the_nodes_of_a_cluster(
    prepared: Callable[..., PreparedStudy], given: str
) -> None:
    assert prepared("budget={money: 20, hours: 2}", given).budget == Budget(20, 2)


def test_a_larger_budget_makes_no_other_study(prepared: Callable[..., PreparedStudy]) -> None:
    assert prepared().digest == prepared("budget.hours=2", "cluster.price_per_hour=3").digest


def test_every_problem_is_told_at_once_with_its_line(study_file: Path) -> None:
    text = (
        study_file.read_text().replace("bits: [3, 4, 8]", "bits: [3, 4, 9]").replace("goal: max", "goal: up")
    )
    study_file.write_text(text + "serch: {candidates: 5}\n")
    found = {line.split(": ")[0] for line in problems(study_file)}
    where = {key: number for number, key in enumerate(text.splitlines(), 1)}
    accuracy = next(n for line, n in where.items() if "accuracy" in line)
    bits = next(n for line, n in where.items() if "rtn" in line)
    assert found == {
        f"{study_file}:{accuracy} objectives.accuracy.goal",
        f"{study_file}:{bits} space.bits.rtn.bits",
        f"{study_file}:{len(where) + 1} serch",
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


def test_a_model_that_brings_code_of_its_own_is_refused(study_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}))
    (line,) = problems(study_file, f"model={folder}")
    assert "auto_map" in line


def test_data_that_a_technique_needs_must_be_given(study_file: Path) -> None:
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


def test_all_that_one_timing_can_tell_is_measured_with_it(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_counters, "counters", lambda *_: [])
    memory = ["memory"] if machine.peak_memory_bytes() else []
    assert prepared("objectives.decode_ms={goal: min}").plan.timers == ("latency", *memory)
    priced = prepared("objectives.decode_ms={goal: min}", "target.price_per_hour=0.1").plan
    assert priced.timers == ("cost", "latency", *memory)
    assert priced.timed == {"decode_ms"}


def test_tasks_are_measured_wherever_they_are_given(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("data.tasks={names: [arc_easy, 'hellaswag:acc_norm'], items: 20}")
    assert ready.plan.meters == ("lm_eval_tasks", "size", "text")
    fewer = prepared("data.tasks={names: [arc_easy], items: 20}")
    assert fewer.plan.materials_digest != ready.plan.materials_digest


def test_a_table_predicts_the_cost_of_what_is_proposed(prepared: Callable[..., PreparedStudy]) -> None:
    ready = prepared("objectives.decode_ms={goal: min}")
    choices = {knob: domain.values[-1] for knob, domain in ready.space.knobs().items()}  # type: ignore[union-attr]
    without = propose(ready, CostModel.of(ready), choices).cost
    units = dict.fromkeys([*amounts(ready.layout), "linear packed 8", "weights packed 8 group 64"], 1.0)
    told = with_table(ready, Table({"decode_ms": units}, {"decode_ms": 0.05}))
    assert without is not None
    assert without.predicted == {}
    found = propose(told, CostModel.of(told), choices).cost
    assert found is not None
    assert found.predicted["decode_ms"] < told.plan.original_cost.predicted["decode_ms"]
    assert told.plan.prediction_errors == {"decode_ms": 0.05}
    few = with_table(ready, Table({"decode_ms": dict.fromkeys(amounts(ready.layout), 1.0)}, {}))
    assert propose(few, CostModel.of(few), choices).cost == without


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


def test_the_surrogate_begins_with_each_technique_by_itself_as_little_and_as_much_as_it_may(
    prepared: Callable[..., PreparedStudy],
) -> None:
    def first(*overrides: str) -> list[tuple[str, float]]:
        ready = prepared("search.candidates=40", "search.algorithm=surrogate", *overrides)
        costs = CostModel.of(ready)
        known = KnownMetrics(ready, costs)
        design = initial_design(ready, known)
        sizes = [known(choices)["size_bytes"] for choices in design]
        recipes = [str(propose(ready, costs, choices).recipe) for choices in design]
        return list(zip(recipes, sizes, strict=True))

    every = dict(first())
    least, most = list(every)[:3], list(every)[3:]
    assert set(least) == {"rtn(bits=8, group=32)", "drop_layers(count=1)", "prune_ffn(ratio=0.2)"}
    assert set(most) == {"rtn(bits=3)", "drop_layers(count=2)", "prune_ffn(ratio=0.4)"}
    assert [every[one] for one in least] == sorted(every[one] for one in least)
    assert first("search.candidates=8") == first()[:2]
    assert first("search.algorithm=random") == []
    assert dict(first(f"objectives.size_bytes.limit={every['rtn(bits=3)']}")).keys() == {"rtn(bits=3)"}


def test_in_the_opening_all_blocks_choose_alike(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(
        text.replace("bits: [3, 4, 8]", "bits: {choices: [3, 4, 8], each: layer, groups: 2}")
    )
    ready = prepare(load(study_file, ["search.candidates=40", "search.algorithm=surrogate"]))
    costs = CostModel.of(ready)
    design = initial_design(ready, KnownMetrics(ready, costs))
    found = {str(propose(ready, costs, choices).recipe) for choices in design}
    assert {"rtn(bits=8, group=32)", "rtn(bits=3)"} < found


def with_space(file: Path, space: str) -> Path:
    """The study with this space instead of its own."""
    text = file.read_text()
    before, after = text.index("space:"), text.index("search:")
    other = file.with_name("other.yaml")
    other.write_text(f"{text[:before]}space: {{{space}}}\n{text[after:]}")
    return other


def test_a_stage_that_not_all_of_the_space_can_train_at_is_refused(study_file: Path) -> None:
    def told(space: str) -> list[str]:
        return problems(with_space(study_file, space), "cluster.zero_stage=3")

    (aware,) = told("rank: {anneal_rank: {}}, sparse: {gradual_prune: {}}")
    assert "cluster.zero_stage: got 3, expected auto or at most 2: anneal_rank, gradual_prune read" in aware
    (sparse,) = told("sparse: {magnitude: {}}, recover: {distill: {steps: [0, 3]}}")
    assert "at most 2: distill read" in sparse
    dense = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    assert prepare(load(dense, ("cluster.zero_stage=3",)))


def test_only_what_trains_is_spread_over_ranks_and_by_itself_no_further_than_it_needs(
    study_file: Path,
) -> None:
    spread = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    ready = prepare(load(spread, ("cluster.slots=4",)))
    origin = ready.plan.original.origin
    dropped, distilled = (Recipe(origin, steps) for steps in ((DropLayers(1),), (DropLayers(1), Distill())))
    train = Job(distilled, ("size", "text"), "materials")
    assert JobResources.for_study(ready).ranks(train, 4) == 1
    asked = prepare(load(spread, ("cluster={slots: 4, ranks: 3}",)))
    assert JobResources.for_study(asked).ranks(train, 4) == 3
    assert JobResources.for_study(asked).ranks(Job(dropped, ("size",), "materials"), 4) == 1
    assert JobResources.for_study(asked).ranks(Job(ready.plan.original, ("size",), "materials"), 4) == 1
    # Its model is there already.
    assert JobResources.for_study(asked).ranks(dataclasses.replace(train, fidelity=1.0, after=0.5), 4) == 1
    # A device that holds the training but for a part of the optimizer's states.
    alone = JobResources.for_study(ready).memory_gib(train)
    tight = prepare(load(spread, (f"cluster={{slots: 4, device_gib: {alone - 0.001}}}",)))
    assert JobResources.for_study(tight).ranks(train, 4) == 2
    assert JobResources.for_study(tight).memory_gib(train, 2) < alone


def test_how_trainings_are_spread_makes_no_other_study(study_file: Path) -> None:
    file = with_space(study_file, "depth: {drop_layers: {count: [1]}}, recover: {distill: {}}")
    cluster = "cluster={slots: 2, ranks: 2, zero_stage: 3, micro_batch: 2, device_gib: 80}"
    spread = prepare(load(file, (cluster,)))
    assert spread.digest == prepare(load(file)).digest
    assert sharing_of(spread.config.cluster) == Sharing(zero_stage=3, micro_batch=2, device_gib=80)


def test_what_a_job_asks_of_a_cluster_is_told_by_the_study(prepared: Callable[..., PreparedStudy]) -> None:
    given = ["cluster.timing={target: laptop}", "cluster.gpus=2"]
    timed = ["objectives={size_bytes: {goal: min}, prefill_ms: {goal: min}}", "target.threads=1"]
    ready = prepared(*given, *timed, "cluster.address=auto")
    job, timing = (Job(ready.plan.original, meters, "") for meters in (("size",), ready.plan.timers))
    memory_gib = JobResources.for_study(ready).memory_gib(job)
    assert JobResources.for_study(ready).of(job, False, 4) == Resources(gpus=2, memory_gib=memory_gib)
    # Tried again alone, since memory ran out.
    assert JobResources.for_study(ready).of(job, True, 4) == Resources(
        gpus=2, memory_gib=memory_gib, exclusive=True
    )
    on_laptop = Resources(memory_gib=memory_gib, exclusive=True, labels={"target": "laptop"})
    assert JobResources.for_study(ready).of(timing, True, 4) == on_laptop
    here = prepared(given[0], *timed)
    assert JobResources.for_study(here).of(timing, True, 4) == Resources(
        memory_gib=memory_gib, exclusive=True
    )


def test_as_many_jobs_share_a_gpu_as_its_memory_holds(
    prepared: Callable[..., PreparedStudy], study_file: Path
) -> None:
    assert [share_of_gpu(each, 24.0) for each in (24.0, 12.1, 12.0, 7.0, 40.0)] == [1, 1, 0.5, 0.3333, 1]
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
