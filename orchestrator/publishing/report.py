"""Write the report of a study as one self-contained HTML page, which needs no network."""

from __future__ import annotations

import html
import statistics
from collections import defaultdict
from collections.abc import Sequence

import plotly.io

from orchestrator.publishing.front_figure import front_figure
from orchestrator.publishing.metric_text import metric_label, metric_value
from orchestrator.study.candidate import Candidate
from orchestrator.study.front_snapshot import Difference
from orchestrator.study.results import (
    COSTS,
    Results,
    difference,
    errors,
    indistinguishable_objectives,
    metrics,
    prediction_errors,
    rank_flips,
)
from orchestrator.study.savings import Savings

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1b1f24;
  max-width: 1240px; margin: 0 auto; padding: 28px 32px 64px; background: #fff; }
h1 { font-size: 24px; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; font-weight: 650; margin: 36px 0 8px; }
p { margin: 4px 0 0; color: #57606a; max-width: 80ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: #57606a; border-bottom: 1px solid #c9ced4; padding: 6px 10px;
  vertical-align: bottom; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #eceef0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { color: #8a929b; font-size: 12px; }
.text th, .text td { text-align: left; white-space: normal; }
tr.original td { color: #b42318; }
.name { display: inline-block; margin-left: 8px; padding: 0 7px; border-radius: 9px; background: #e7f0ec;
  color: #21634a; font-size: 12px; white-space: nowrap; }
pre { background: #f6f7f8; padding: 14px 16px; border-radius: 6px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
"""


def report_html(results: Results, yaml_text: str, savings: Savings, spent: Sequence[str] = ()) -> str:
    """Return the whole page. spent: lines about the time and cost of the study."""
    figure = plotly.io.to_html(
        front_figure(results), full_html=False, include_plotlyjs=True, config={"displaylogo": False}
    )
    title = html.escape(results.study)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: the front</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{_summary(results)}</p>\n{figure}\n"
        f"<h2>The front, relative to the original</h2>\n{_front_table(results)}\n{_failures(results)}\n"
        f"{_predictions(results)}\n{_race(results)}\n{_sharing(savings)}\n{_took(spent)}\n"
        f"<h2>Environment</h2>\n{_environment(results)}\n<h2>Study</h2>\n"
        f"<pre>{html.escape(yaml_text)}</pre>\n</body></html>\n"
    )


def _summary(results: Results) -> str:
    counts: dict[str, int] = defaultdict(int)
    for standing in results.standings.values():
        counts[standing] += 1
    words = {
        "front": "on the front", "dominated": "dominated", "over_limit": "over a limit", "failed": "failed",
        "unreliable": "too noisy to compare", "other_environment": "measured in another environment, not compared",
        "incomplete": "measured in part", "eliminated": "adds little by a part of the evaluation",
        "stopped": "stopped early", "waiting": "not measured",
    }  # fmt: skip
    parts = [f"{counts[standing]} {text}" for standing, text in words.items() if counts[standing]]
    limits = [
        f"{metric_label(o.metric)} {'≤' if o.goal == 'min' else '≥'} {metric_value(o.metric, o.limit)}"
        for o in results.objectives
        if o.limit is not None
    ]
    volume, alike = results.hypervolume, indistinguishable_objectives(results)
    text = f"{len(results.candidates)} models: {', '.join(parts)}."
    text += f" Limits: {', '.join(limits)} (dotted)." if limits else ""
    text += f" Hypervolume {volume:.3f} of 1." if volume is not None else ""
    if alike:
        text += f" No two models of the front differ in {', '.join(alike)} by more than two standard errors."
    return html.escape(text + " Bars are standard errors; for timings, the spread.")


def _front_table(results: Results) -> str:
    names = [objective.metric for objective in results.objectives]
    named: dict[str, list[str]] = defaultdict(list)
    for name, id in results.picks.items():
        named[id].append(name)
    by_id = {candidate.id: candidate for candidate in results.candidates}
    head = "".join(f"<th>{html.escape(metric_label(n))}</th><th>vs original</th>" for n in names)
    rows = [_row(results.original, results, [], "original")] if results.original.id not in named else []
    rows += [_row(by_id[id], results, named[id], "") for id in results.members]
    return f'<div class="scroll"><table><tr><th>recipe</th>{head}</tr>\n' + "\n".join(rows) + "</table></div>"


def _row(candidate: Candidate, results: Results, named: Sequence[str], kind: str) -> str:
    known, spread, original = metrics(candidate), errors(candidate), metrics(results.original)
    tags = "".join(f'<span class="name">{html.escape(name)}</span>' for name in named)
    cells = [f"<td>{html.escape(str(candidate.recipe))}{tags}</td>"]
    for objective in results.objectives:
        name = objective.metric
        if name not in known:
            cells.append("<td>–</td><td></td>")
            continue
        error = f" <small>± {metric_value(name, spread[name], False)}</small>" if name in spread else ""
        apart = None if kind == "original" else difference(candidate, results.original, name)
        relative = "" if kind == "original" else _relative(name, known[name], original.get(name), apart)
        cells.append(f"<td>{metric_value(name, known[name])}{error}</td><td>{relative}</td>")
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _relative(metric: str, value: float, original: float | None, apart: Difference | None) -> str:
    """Return the value relative to the original: size as a share, time as a speed-up, accuracy in points, other metrics
    in percent; with the standard error of the difference if both were measured on the same items."""
    if not original or not value:
        return ""
    if metric.endswith("_ms"):
        return f"{original / value:.2f}× faster" if value <= original else f"{value / original:.2f}× slower"
    if metric.endswith(COSTS):
        return f"{value / original:.0%}"
    if "accuracy" in metric:
        error = f" <small>± {apart.error * 100:.1f}</small>" if apart else ""
        return f"{(value - original) * 100:+.1f} points{error}"
    error = f" <small>± {apart.error / abs(original):.1%}</small>" if apart else ""
    return f"{value / original - 1:+.1%}{error}"


def _failures(results: Results) -> str:
    """The table of candidates that failed, exceeded a limit or were stopped, by kind."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in results.candidates:
        if one.failure is not None:
            kinds[one.failure.kind.replace("_", " ")].append((str(one.recipe), one.failure.message))
        elif one.stopped is not None:
            kinds["stopped early"].append((str(one.recipe), one.stopped))
        elif results.standings[one.id] == "over_limit" and one.id != results.original.id:
            broken = [o for o in results.objectives if o.metric in metrics(one)]
            broken = [o for o in broken if o.broken_by(metrics(one)[o.metric])]
            texts = [
                f"{metric_label(o.metric)} {metric_value(o.metric, metrics(one)[o.metric])}" for o in broken
            ]
            kinds["over a limit"].append((str(one.recipe), ", ".join(texts)))
    if not kinds:
        return ""
    rows = [
        f"<tr><td>{html.escape(recipe)}</td><td>{html.escape(kind)}</td><td>{html.escape(message[:200])}</td></tr>"
        for kind, found in sorted(kinds.items())
        for recipe, message in found
    ]
    head = "<tr><th>recipe</th><th>kind</th><th>reason</th></tr>"
    count = ", ".join(f"{len(found)} {kind}" for kind, found in sorted(kinds.items()))
    table = f'<div class="scroll text"><table>{head}{"".join(rows)}</table></div>'
    return f"<h2>Failed, over a limit or stopped: {count}</h2>{table}"


def _predictions(results: Results) -> str:
    """The errors of predictions for each metric that was predicted and measured."""
    off: dict[str, list[float]] = defaultdict(list)
    for one in results.candidates:
        for metric, error in prediction_errors(one).items():
            off[metric].append(abs(error))
    if not off:
        return ""
    texts = [
        f"{metric_label(metric)} by {statistics.median(found):.1%} (median), {max(found):.1%} (worst of {len(found)})"
        for metric, found in sorted(off.items())
    ]
    return (
        f"<h2>Predictions, which steered the search</h2>\n<p>Off what was measured: {'; '.join(texts)}.</p>"
    )


def _race(results: Results) -> str:
    """The share of the evaluation that was used, and how well smaller shares predicted larger ones."""
    read = sum(one.fidelity for one in results.candidates if one.measurement is not None)
    every = sum(one.measurement is not None for one in results.candidates)
    if read == every:
        return ""
    texts = [
        f"{metric_label(flips.metric)} from {flips.low:.0%} to {flips.high:.0%} of it: {flips.flipped} of {flips.pairs}"
        for flips in rank_flips(results)
    ]
    return (
        f"<h2>Evaluation on smaller shares</h2>\n<p>"
        f"{every} models were measured on {read / every:.0%} of the evaluation, on average. "
        f"Pairs whose order changed when they were measured on more: {'; '.join(texts) or 'none were'}.</p>"
    )


def _sharing(savings: Savings) -> str:
    """The measured seconds that sharing saved; empty if nothing was shared."""
    parts = [
        (
            f"{savings.steps} steps shared by several candidates",
            savings.steps and savings.steps_seconds,
        ),
        ("statistics reused from earlier candidates", savings.statistics_seconds),
        (f"{savings.jobs} jobs already in the store", savings.jobs and savings.jobs_seconds),
    ]
    texts = [f"{what} ({seconds:,.1f} s)" for what, seconds in parts if seconds]
    if not texts:
        return ""
    return (
        f"<h2>Time saved by sharing</h2>\n<p>{html.escape('; '.join(texts))}: {savings.seconds:,.1f} s of one slot's "
        f"time saved, measured where the same work was done.</p>"
    )


def _took(spent: Sequence[str]) -> str:
    """Time, nodes and money; the total is first."""
    if not spent:
        return ""
    return "<h2>Time and cost</h2>\n" + "\n".join(f"<p>{html.escape(one)}</p>" for one in spent)


def _environment(results: Results) -> str:
    measurement = results.original.measurement
    known = measurement.environment if measurement else {}
    return (
        f"<p>{html.escape(' · '.join(f'{name} {value}' for name, value in known.items()) or 'unknown')}</p>"
    )
