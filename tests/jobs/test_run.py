"""One job on a worker: the original or one step is built, its files are measured, and every failure becomes data."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from jobs.failures import failure
from jobs.job import Failure, Job
from jobs.materials import Materials, TextSource
from jobs.models import loading
from jobs.models.layout import LAYOUT_FILE
from jobs.models.model import Model
from jobs.recipe import Origin, Recipe
from jobs.run import JobDirs, JobOutput, RankDone, WorkRequest, attempt
from jobs.techniques.distill import Distill
from jobs.techniques.drop_layers import DropLayers
from jobs.techniques.synthesize import Synthesize

ROOT = Recipe(Origin("model", "data", seed=0))


@pytest.fixture
def materials(tiny_llama: Path, text_file: Path) -> Materials:
    def source(low: float, high: float) -> TextSource:
        return TextSource(str(text_file), 8, 32, part=(low, high))

    return Materials(str(tiny_llama), "causal-lm", source(0, 0.3), source(0.3, 0.6), source(0.6, 1))


def run(
    recipe: Recipe,
    materials: Materials,
    folder: Path,
    *,
    parent: Path | None = None,
    built: Path | None = None,
) -> JobOutput | Failure:
    job = Job(recipe, ("text", "size"), "materials")
    dirs = JobDirs(folder / "artifact", folder / "cache")
    output = attempt(WorkRequest(job, materials, dirs, parent, built), lambda share, activity: None)
    assert not isinstance(output, RankDone)
    return output


@pytest.fixture
def root(materials: Materials, tmp_path: Path) -> Path:
    """Return the folder of the original's artifact."""
    output = run(ROOT, materials, tmp_path / "root")
    assert isinstance(output, JobOutput)
    assert output.built
    return tmp_path / "root" / "artifact"


def test_the_artifact_of_the_original_has_its_weights_in_bf16(root: Path, tiny_llama: Path) -> None:
    loaded, original = loading.load(root), loading.load(tiny_llama)
    for name, tensor in original.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name
    assert (root / "model.safetensors").stat().st_size == original.layout().size_bytes()


def test_a_step_is_built_from_its_parent_and_stores_its_recipe(
    root: Path, materials: Materials, tmp_path: Path
) -> None:
    recipe = ROOT.then(DropLayers(count=1))
    output = run(recipe, materials, tmp_path, parent=root)
    assert isinstance(output, JobOutput), output
    assert output.built
    assert len(loading.load(tmp_path / "artifact").blocks) == 3
    layout_file = json.loads((tmp_path / "artifact" / LAYOUT_FILE).read_text())
    assert Recipe.from_dict(layout_file["recipe"]) == recipe
    assert layout_file["text"] == "drop_layers(count=1)"
    weights = tmp_path / "artifact" / loading.WEIGHTS
    assert output.measurement.metrics["size_bytes"] == weights.stat().st_size


def test_a_training_step_reads_teacher_and_training_text(
    root: Path, materials: Materials, tmp_path: Path
) -> None:
    smaller = run(ROOT.then(DropLayers(count=1)), materials, tmp_path / "a", parent=root)
    assert isinstance(smaller, JobOutput)
    step = Distill(steps=8, batch=2, learning_rate=3e-3)
    recipe = ROOT.then(DropLayers(count=1)).then(step)
    output = run(recipe, materials, tmp_path / "b", parent=tmp_path / "a" / "artifact")
    assert isinstance(output, JobOutput), output
    assert output.measurement.metrics["perplexity"] != smaller.measurement.metrics["perplexity"]


def test_the_notes_of_a_step_are_stored_with_its_artifact_and_all_descendants(
    root: Path, materials: Materials, tmp_path: Path
) -> None:
    shortened = ROOT.then(DropLayers(count=1))
    synthesized = shortened.then(Synthesize(samples=4, tokens=16, steps=1))
    shortened_again = synthesized.then(DropLayers(count=2))
    parent, notes = root, []
    for recipe in (shortened, synthesized, shortened_again):
        output = run(recipe, materials, tmp_path / recipe.id, parent=parent)
        assert isinstance(output, JobOutput), output
        parent = tmp_path / recipe.id / "artifact"
        notes.append(loading.read_provenance(parent)["notes"])
    assert notes[0] == []
    (note,) = notes[1]
    assert note["step"] == str(synthesized.steps[-1])
    assert note["written"]["samples"] == 4
    assert notes[2] == notes[1]


def test_an_interrupted_training_resumes_in_the_next_attempt(
    root: Path, materials: Materials, tmp_path: Path
) -> None:
    """Checkpoints are kept outside the folder of an attempt."""
    recipe = ROOT.then(Distill(steps=60, learning_rate=3e-3))
    reports_by_attempt: list[list[str]] = []

    def run_attempt(name: str, checkpoints: Path, report_limit: int) -> JobOutput | Failure:
        reports: list[str] = []
        reports_by_attempt.append(reports)

        def report(share: float, activity: str) -> None:
            if activity.startswith("step "):
                reports.append(activity)
                if len(reports) == report_limit:
                    raise RuntimeError("cut off")

        folder = tmp_path / name
        job = Job(recipe, ("size",), "materials")
        dirs = JobDirs(folder / "artifact", folder / "cache", checkpoints)
        output = attempt(WorkRequest(job, materials, dirs, parent=root), report)
        assert not isinstance(output, RankDone)
        return output

    assert isinstance(run_attempt("whole", tmp_path / "unused", 1000), JobOutput)
    assert isinstance(run_attempt("first", tmp_path / "kept", 55), Failure)
    assert isinstance(run_attempt("second", tmp_path / "kept", 1000), JobOutput)
    assert reports_by_attempt[1] + reports_by_attempt[2][5:] == reports_by_attempt[0]
    uninterrupted, resumed = (loading.load(tmp_path / name / "artifact") for name in ("whole", "second"))
    for name, tensor in uninterrupted.module.state_dict().items():
        torch.testing.assert_close(resumed.module.state_dict()[name], tensor, rtol=1e-6, atol=0)


def test_an_existing_artifact_is_only_measured(root: Path, materials: Materials, tmp_path: Path) -> None:
    output = run(ROOT, materials, tmp_path, built=root)
    assert isinstance(output, JobOutput)
    assert not output.built
    assert not (tmp_path / "artifact").exists()


def test_a_step_that_cannot_be_applied_fails_as_invalid(
    root: Path, materials: Materials, tmp_path: Path
) -> None:
    failed = run(ROOT.then(DropLayers(count=4)), materials, tmp_path, parent=root)
    assert isinstance(failed, Failure)
    assert failed.kind == "invalid"
    assert "drop_layers.count=4" in failed.message


def test_a_step_that_gives_nan_weights_fails_as_diverged(
    root: Path, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: DropLayers, model: Model, context: object) -> Model:
        next(model.blocks.parameters()).fill_(torch.nan)
        return model

    monkeypatch.setattr(DropLayers, "compress", spoil)
    monkeypatch.setattr(DropLayers, "output_layout", lambda self, layout: layout)
    failed = run(ROOT.then(DropLayers(count=1)), materials, tmp_path, parent=root)
    assert isinstance(failed, Failure)
    assert failed.kind == "diverged"


def test_a_step_whose_model_differs_from_its_predicted_layout_fails_as_a_bug(
    root: Path, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DropLayers, "output_layout", lambda self, layout: layout)
    failed = run(ROOT.then(DropLayers(count=1)), materials, tmp_path, parent=root)
    assert isinstance(failed, Failure)
    assert failed.kind == "bug"
    assert "of another layout than it predicted" in failed.message


def test_a_text_that_is_too_short_fails_as_invalid(materials: Materials, root: Path, tmp_path: Path) -> None:
    evaluation = dataclasses.replace(materials.evaluation, samples=10**6)
    failed = run(ROOT, dataclasses.replace(materials, evaluation=evaluation), tmp_path, built=root)
    assert isinstance(failed, Failure)
    assert failed.kind == "invalid"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "invalid"),
        (FloatingPointError("x"), "diverged"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("x"), "out_of_memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out_of_memory",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk_full",
        ),
        (OSError(errno.EACCES, "Permission denied"), "bug"),
        (RuntimeError("shapes differ"), "bug"),
        (KeyError("x"), "bug"),
    ],
)
def test_the_kind_of_a_failure_follows_from_the_exception(error: Exception, kind: str) -> None:
    classified = failure(error)
    assert classified.kind == kind
    assert type(error).__name__ in classified.traceback
