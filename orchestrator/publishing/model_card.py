"""Write the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs import techniques
from jobs.materials import Materials
from jobs.models import sources


def model_card(
    format: str,
    member: Mapping[str, Any],
    original: Mapping[str, Any],
    materials: Materials,
    steps: Sequence[str],
) -> str:
    """The model card, with the head that model hubs read. steps: the techniques that made it."""
    licence = sources.licence(materials.model)
    head = [f"license: {licence}"] if licence else []
    head += (
        [f"base_model: {materials.model}"] if "/" in materials.model and ":" not in materials.model else []
    )
    rows = [
        f"| {metric} | {_number(value, member['errors'].get(metric))} "
        f"| {_number(original['metrics'].get(metric), original['errors'].get(metric))} |"
        for metric, value in sorted(member["metrics"].items())
    ]
    target = materials.target
    needs = {need for step in steps for need in techniques.load(step).needs}
    texts = {
        "Evaluated": materials.evaluation,
        "Calibrated": materials.calibration if needs & {"calibration", "gradients"} else None,
        "Trained": materials.training if "training" in needs else None,
    }
    data = [
        f"- {use} on {source.path}, {source.samples} windows of {source.tokens} tokens"
        for use, source in texts.items()
        if source is not None
    ]
    licensed = licence or "not stated by the model's folder: ask its makers before you pass this on"
    where = [f"- {name}: {value}" for name, value in sorted(member["environment"].items())]
    lines = [
        "---", *head, "tags: [slimfront]", "---",
        f"# A smaller {materials.model}", "",
        f"Made by slimfront from `{materials.model}` by `{member['recipe']}`; in the form `{format}`.",
        f"Licence of the original: {licensed}.", "",
        "## Measured", "",
        f"In the runtime `{target.runtime}` on {target.threads} threads, with prompts of {target.prompt_tokens} tokens "
        f"and {target.new_tokens} new ones. ± is the standard error, of times half the interquartile range.", "",
        "| metric | this model | the original |", "|---|---|---|", *rows, "",
        *data, "",
        "## Where", "", *where, "",
        "`recipe.json` says how it was made, `measurement.json` what was measured; `slimfront verify` measures again.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.5g}"
    return shown + (f" ± {error:.2g}" if error else "")
