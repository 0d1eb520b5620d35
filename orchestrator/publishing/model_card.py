"""Write the model card of an export."""

from __future__ import annotations

from collections.abc import Sequence

from jobs import techniques
from jobs.materials import Materials
from jobs.models import sources
from orchestrator.study.front_snapshot import FrontMember, MeasuredModel


def model_card(
    format: str,
    member: FrontMember,
    original: MeasuredModel,
    materials: Materials,
    steps: Sequence[str],
) -> str:
    """Return the model card as Markdown, with the YAML header that model hubs read.

    steps: the names of the techniques in the member's recipe.
    """
    licence = sources.licence(materials.model)
    licence_text = (
        licence or "not stated in the model's folder; ask its authors before you distribute this model"
    )
    measured, target = member.measured, materials.target
    environment = [f"- {name}: {value}" for name, value in sorted(measured.environment.items())]
    lines = [
        *_header(licence, materials.model),
        f"# A smaller {materials.model}", "",
        f"Made by slimfront from `{materials.model}` by `{member.recipe}`, in the format `{format}`.",
        f"Licence of the original: {licence_text}.", "",
        "## Measurements", "",
        f"Measured in the runtime `{target.runtime}` on {target.threads} threads, with prompts of "
        f"{target.prompt_tokens} tokens and {target.new_tokens} generated tokens. ± is the standard error; for times, "
        "half the interquartile range.", "",
        "| metric | this model | the original |", "|---|---|---|", *_rows(measured, original), "",
        *_data(materials, steps), "",
        "## Environment", "", *environment, "",
        "`recipe.json` is the recipe, `measurement.json` the measurement. `slimfront verify` measures again.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _header(licence: str | None, model: str) -> list[str]:
    header = ["---"]
    if licence:
        header.append(f"license: {licence}")
    if "/" in model and ":" not in model:
        header.append(f"base_model: {model}")
    return [*header, "tags: [slimfront]", "---"]


def _rows(measured: MeasuredModel, original: MeasuredModel) -> list[str]:
    rows = []
    for metric, value in sorted(measured.metrics.items()):
        ours = _number(value, measured.errors.get(metric))
        theirs = _number(original.metrics.get(metric), original.errors.get(metric))
        rows.append(f"| {metric} | {ours} | {theirs} |")
    return rows


def _data(materials: Materials, steps: Sequence[str]) -> list[str]:
    """The texts that the steps and the evaluation read."""
    needs = {need for step in steps for need in techniques.load(step).needs}
    texts = {"Evaluated": materials.evaluation}
    if needs & {"calibration", "gradients"} and materials.calibration is not None:
        texts["Calibrated"] = materials.calibration
    if "training" in needs and materials.training is not None:
        texts["Trained"] = materials.training
    return [
        f"- {use} on {source.path}, {source.samples} windows of {source.tokens} tokens"
        for use, source in texts.items()
        if source is not None
    ]


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.5g}"
    if float(value).is_integer() and abs(value) >= 1000:
        text = f"{value:,.0f}"
    if error:
        text += f" ± {error:.2g}"
    return text
